"""Reading picture files, upright and in sRGB; a damaged one is a UserError."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import METADATA_KEY
from gsoft_diffusion.photos.colours import to_srgb

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".heic", ".heif", ".bmp", ".tif", ".tiff"}
# As what a file may be read, whatever its name says. Of what else Pillow reads, EPS runs a program in the file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12, from byte 8
EXIF_ORIENTATION, TURNED = 0x0112, range(2, 9)
# What Pillow's readers raise for damaged files, and RuntimeError of the one for HEIC.
DAMAGE = (
    *(EOFError, IndexError, KeyError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError),
    struct.error,
)
SEQUENCES = ("GIF", "PNG", "TIFF", "WEBP")  # whose further pictures are others, not previews as in photos of telephones


@dataclass(frozen=True)
class Picture:
    """A picture as it is seen.

    image: RGB, or RGBA if it has transparency. turned: whether EXIF data asked to turn it. colours: what was done to
    its colours, in words; "" if nothing. drawn: whether this program drew it.
    """

    image: Image.Image
    turned: bool
    colours: str
    drawn: bool

    @property
    def opacity(self) -> Image.Image | None:
        """In shades from black (transparent) to white (opaque); None if it is opaque everywhere."""
        return self.image.getchannel("A") if self.image.mode == "RGBA" else None


def read_picture(path: Path) -> Picture:
    """The picture in a file, upright and in sRGB. Raises UserError naming the file as `opened` does."""
    with opened(path) as image:
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: has 32 bits a channel, so its white is not known; save it with 8")
        drawn = METADATA_KEY in image.info
        decoded, turned = upright(path, image)
    seen, colours = to_srgb(decoded)
    if seen.mode == "RGBA" and seen.getchannel("A").getextrema() == (255, 255):
        seen = seen.convert("RGB")
    return Picture(seen, turned, colours, drawn)


def open_image(path: Path) -> Image.Image:
    """The picture in a file, upright and in RGB, transparent parts white. Raises UserError as `opened` does."""
    image = read_picture(path).image
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def content(path: Path) -> bytes:
    """The bytes of a picture's file, or of a mask's. Raises UserError naming the file if it cannot be read."""
    with _damage_explained(path):
        return path.read_bytes()


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The picture in a file as Pillow opens it: what it is is known in the block, its pixels are read by `upright`.

    Raises UserError naming the file if it cannot be read, is of none of `FORMATS` and no HEIC, damaged, a sequence of
    pictures, or so large that it may be an attack (Pillow's limit).
    """
    with _damage_explained(path), path.open("rb") as file:
        start = file.read(12)
    formats: tuple[str, ...] = FORMATS
    if start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS:
        _enable_heic(path)
        formats = ("HEIF",)
    with _damage_explained(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the size is an error, and enough
        image = Image.open(path, formats=formats)
    with image:
        with _damage_explained(path):
            count = getattr(image, "n_frames", 1)
        if count > 1 and image.format in SEQUENCES:
            raise UserError(f"{path}: a sequence of {count} pictures; save the one you want as a single picture")
        yield image


def upright(path: Path, image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture with its pixels read, turned as its EXIF data asks, and whether that asks to turn it.

    path: the file, for messages. image: as `opened` gave it. Raises UserError naming the file if it is damaged.
    """
    with _damage_explained(path):
        turned = image.getexif().get(EXIF_ORIENTATION) in TURNED
        return ImageOps.exif_transpose(image), turned


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """Inside the block, what is raised for a file that cannot be read, or is damaged or too large, is a UserError that
    names it.
    """
    try:
        yield
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large a picture, make it smaller ({error})") from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not Pillow's
            raise UserError(f"{path}: cannot be read ({error.strerror}); correct that, or remove it") from error
        raise UserError(f"{path}: damaged or not a picture; repair or remove it ({error})") from error


def _enable_heic(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError(f"{path}: reading HEIC needs a library: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()
