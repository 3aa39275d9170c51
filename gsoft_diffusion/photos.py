"""Photos as people have them: files in a folder, upright, with captions and masks beside them, cropped to a size.

dog1.jpg
dog1.txt               its caption, used as its prompt; or a line of metadata.jsonl:
metadata.jsonl         {"file_name": "dog1.jpg", "text": "a photo of a sks dog in the snow"}
dog1-masklabel.png     where the subject is, white on black; or the transparency of the photo itself
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gsoft_diffusion.errors import UserError, first_line

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif", ".bmp", ".tif", ".tiff"}
MASK_END = "-masklabel"  # as OneTrainer names mask files
METADATA = "metadata.jsonl"  # as Hugging Face's imagefolder names its table
EXIF_ORIENTATION = 0x0112
USUAL_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # Pillow's; of the others it is said that they were converted
SMALLEST = 2  # pixels along the shorter side
SEQUENCES = ("GIF", "PNG", "TIFF", "WEBP")  # whose further pictures are others, not previews as in photos of telephones
CROPS = 5  # places along the side that a crop leaves out something of, for a random crop to choose from

Size = tuple[int, int]  # width and height in pixels, as in Pillow


# Folders


@dataclass(frozen=True)
class Photo:
    """A picture and what it is trained with.

    prompt: its caption, or the prompt of its folder if it has none.
    size: upright. turned: whether EXIF data asked to turn it. mode: Pillow's name for the colours in the file.
    mask: the file that says where the subject is: another one, or the photo itself by its transparency.
    """

    path: Path
    prompt: str
    size: Size
    turned: bool = False
    mode: str = "RGB"
    mask: Path | None = None


@dataclass(frozen=True)
class Folder:
    """The photos of a folder in order of their names, and how many files were no pictures, captions or masks."""

    photos: tuple[Photo, ...]
    captions: int
    skipped: int

    def __str__(self) -> str:
        masks = sum(photo.mask is not None for photo in self.photos)
        parts = [f"{len(self.photos)} pictures"]
        parts += [f"{self.captions} with captions"] if self.captions else []
        parts += [f"{masks} with masks"] if masks else []
        parts += [f"{sum(photo.turned for photo in self.photos)} turned upright by their EXIF data"]
        odd = Counter(photo.mode for photo in self.photos if photo.mode not in USUAL_MODES)
        parts += [f"{count} converted from {mode} to RGB" for mode, count in sorted(odd.items())]
        return f"{', '.join(parts)}; {self.skipped} other files skipped"


def read_folder(folder: str | Path, flag: str, prompt: str, *, limit: int | None = None) -> Folder:
    """The photos in a folder with their captions and masks; `prompt` for photos that have no caption.

    Every file is read once, so that a damaged one is found now and not an hour later. Raises UserError naming the file
    for whatever is damaged, ambiguous or does not belong together.

    flag: the option that named the folder, for error messages. limit: use only so many pictures.
    """
    paths, others = list_images(folder, flag)
    captions, caption_files = read_captions(Path(folder), paths)
    masks = find_masks(Path(folder), paths)
    photos = []
    for path in paths[:limit]:
        image, turned, mode = _open_upright(path)
        if min(image.size) < SMALLEST:
            found = "×".join(map(str, image.size))
            raise UserError(f"{path}: only {found} pixels, too small to show anything; use a larger picture")
        mask = masks.get(path) or (path if _alpha(image) is not None else None)
        photos.append(Photo(path, captions.get(path, prompt), image.size, turned, mode, mask))
        if mask:
            _check_mask(photos[-1])
    count = sum(photo.path in captions for photo in photos)
    return Folder(tuple(photos), count, others - caption_files - len(masks))


def list_images(folder: str | Path, flag: str) -> tuple[list[Path], int]:
    """The folder's pictures in order of their names, without masks, and how many other files it holds.

    Raises UserError, naming `flag`, if there is no such folder or no picture in it.
    """
    folder = Path(folder)
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be read as a folder ({error.strerror})") from error
    images = [path for path in files if is_image(path) and not path.stem.endswith(MASK_END)]
    if not images:
        raise UserError(f"{flag} {folder}: holds no picture (known are {', '.join(sorted(IMAGE_SUFFIXES))})")
    return images, len(files) - len(images)


def is_image(path: Path) -> bool:
    """Whether the name is a picture's, and not a hidden one's."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_captions(folder: Path, images: Sequence[Path]) -> tuple[dict[Path, str], int]:
    """The captions of those pictures that have one, and how many files they came from.

    Raises UserError for an empty caption, two for one picture, and one for a picture that is not there.
    """
    captions = _read_metadata(folder, images)
    files = int((folder / METADATA).is_file())
    for image, path in _beside(folder, images, ".txt").items():
        if image in captions:
            raise UserError(f"{path}: {image.name} has a caption in {METADATA} already; remove one of them")
        try:
            captions[image] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text ({first_line(error)})") from error
        files += 1
    for image, caption in captions.items():
        captions[image] = " ".join(caption.split())
        if not captions[image]:
            raise UserError(f"{image}: its caption is empty; write one, or remove it to use the instance prompt")
    return captions, files


def _read_metadata(folder: Path, images: Sequence[Path]) -> dict[Path, str]:
    path = folder / METADATA
    if not path.is_file():
        return {}
    named = {image.name: image for image in images}
    captions: dict[Path, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({first_line(error)})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            wanted = '{"file_name": "dog.jpg", "text": "a photo of a sks dog"}'
            raise UserError(f"{path}, line {number}: must be like {wanted} ({first_line(error)})") from error
        if not (isinstance(name, str) and isinstance(text, str)):
            raise UserError(f"{path}, line {number}: file_name and text must be texts")
        if name not in named:
            raise UserError(f"{path}, line {number}: there is no picture {name} in the folder")
        if named[name] in captions:
            raise UserError(f"{path}, line {number}: a second caption for {name}; remove one of them")
        captions[named[name]] = text
    return captions


def find_masks(folder: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """The mask file of each picture that has one: `dog-masklabel.png` for `dog.jpg`. UserError for one without."""
    masks = _beside(folder, images, f"{MASK_END}.png")
    for path in sorted(folder.glob(f"*{MASK_END}.*")):
        if path not in masks.values() and not path.name.startswith("."):
            picture = path.stem.removesuffix(MASK_END)
            raise UserError(f"{path}: is the mask of no picture; one called {picture} takes {picture}{MASK_END}.png")
    return masks


def _beside(folder: Path, images: Sequence[Path], end: str) -> dict[Path, Path]:
    """The file `<stem><end>` of each picture that has one. UserError if two pictures share it."""
    stems: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        stems[image.stem].append(image)
    found = {}
    for stem, sharing in stems.items():
        if (path := folder / f"{stem}{end}").is_file():
            if len(sharing) > 1:
                names = " and ".join(image.name for image in sharing)
                raise UserError(f"{path}: belongs to {names}; give the pictures different names")
            found[sharing[0]] = path
    return found


# Pictures


def open_image(path: Path) -> Image.Image:
    """The picture upright and in RGB, transparent parts white.

    Raises UserError naming the file if it is damaged, or so large that it may be an attack (Pillow's limit).
    """
    return _to_rgb(_open_upright(path)[0])


def open_mask(photo: Photo) -> Image.Image:
    """Where the subject is, in shades from black (not there) to white, in the size of the photo."""
    assert photo.mask is not None
    image = _open_upright(photo.mask)[0]
    if photo.mask == photo.path:
        alpha = _alpha(image)
        assert alpha is not None
        return alpha
    return _to_rgb(image).convert("L")


def _check_mask(photo: Photo) -> None:
    mask = open_mask(photo)
    if mask.size != photo.size:
        found, wanted = ("×".join(map(str, size)) for size in (mask.size, photo.size))
        raise UserError(
            f"{photo.mask}: the mask has {found} pixels, but {photo.path.name} has {wanted}; make them equal"
        )
    if mask.getextrema()[1] == 0:
        what = "transparent everywhere" if photo.mask == photo.path else "black everywhere: white marks the subject"
        raise UserError(f"{photo.mask}: {what}")


def _open_upright(path: Path) -> tuple[Image.Image, bool, str]:
    """The picture with at most 8 bits a channel, whether it was turned, and its mode in the file."""
    with _opened(path) as image:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) != 1
        return _eight_bits(ImageOps.exif_transpose(image)), turned, image.mode


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if path.suffix.lower() in (".heic", ".heif"):
        _enable_heic(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the size is an error, and enough
            with Image.open(path) as image:
                if (count := getattr(image, "n_frames", 1)) > 1 and image.format in SEQUENCES:
                    raise UserError(f"{path}: a sequence of {count} pictures; save the one you want by itself")
                yield image
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large a picture, make it smaller ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise for damaged files
        raise UserError(f"{path}: damaged or not a picture; repair or remove it ({error})") from error


def _enable_heic(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError(f"{path}: reading HEIC needs a library: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip instead of scale
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """The picture's opacity, None if it is opaque everywhere."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    lowest: Any = alpha.getextrema()[0]
    return alpha if lowest < 255 else None


# Sizes and crops


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """Sizes with at most `resolution²` pixels and sides that are multiples of `step`, from 1:4 to 4:1.

    For every side from half to twice the resolution the largest other side that fits. `step` divides `resolution`.
    """
    sides = range(-(-resolution // (2 * step)) * step, 2 * resolution + 1, step)
    pairs = [(side, resolution**2 // (side * step) * step) for side in sides]
    return sorted({size for a, b in pairs if b in sides for size in ((a, b), (b, a))})


def nearest_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` that loses least of a picture of this size when it is cropped; the largest of equals."""
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda other: (abs(math.log(other[0] / other[1]) - aspect), -other[0] * other[1]))


@dataclass(frozen=True)
class Variant:
    """One way of showing a photo.

    size: in pixels.
    place: where along the side that is cropped, 0 (left or top) to 1.
    flip: mirrored left to right.
    """

    size: Size
    place: float = 0.5
    flip: bool = False


def variants(photo: Size, size: Size, center_crop: bool, random_flip: bool) -> list[Variant]:
    """All the ways in which augmentation may show a photo in a size: finitely many, so that all can be cached."""
    same_shape = photo[0] * size[1] == photo[1] * size[0]
    places = [0.5] if center_crop or same_shape else [index / (CROPS - 1) for index in range(CROPS)]
    return [Variant(size, place, flip) for place in places for flip in ((False, True) if random_flip else (False,))]


def pixels(photo: Photo, variant: Variant) -> Tensor:
    """The photo as the variant shows it: (3, height, width) in [-1, 1]."""
    image = crop(open_image(photo.path), variant, variant.size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def view(photo: Photo, variant: Variant) -> Tensor:
    """(6,): height and width of the photo, top and left edge of the crop, height and width of the picture.

    The edges are in pixels of the scaled photo and, in a mirrored picture, of the mirrored photo: what SDXL is told.
    """
    left, top, right, _ = _part(photo.size, variant)
    scale = variant.size[0] / (right - left)
    if variant.flip:
        left = photo.size[0] - right
    width, height = photo.size
    return torch.tensor([height, width, round(top * scale), round(left * scale), variant.size[1], variant.size[0]])


def subject_weights(photo: Photo, variant: Variant, size: Size, unmasked_weight: float) -> Tensor:
    """Weights (1, height, width) of the loss: 1 where the mask is white, `unmasked_weight` where it is black.

    size: of the latents, onto which the mask is averaged. A photo without a mask weighs 1 everywhere.
    """
    if photo.mask is None:
        return torch.ones(1, size[1], size[0])
    mask = torch.from_numpy(np.array(crop(open_mask(photo), variant, size, Image.Resampling.BOX)))[None].float() / 255
    return unmasked_weight + (1 - unmasked_weight) * mask


def crop(image: Image.Image, variant: Variant, size: Size, resampling: Image.Resampling) -> Image.Image:
    """The largest part of the variant's shape at its place, scaled to `size` and mirrored if asked for."""
    image = image.resize(size, resampling, box=_part(image.size, variant))
    return ImageOps.mirror(image) if variant.flip else image


def _part(size: Size, variant: Variant) -> tuple[float, float, float, float]:
    """The part of a photo of this size that the variant shows: left, top, right and bottom edge."""
    (width, height), (across, down) = size, variant.size
    part = min(width, height * across / down), min(height, width * down / across)
    left, top = (variant.place * (length - side) for length, side in zip(size, part, strict=True))
    return left, top, left + part[0], top + part[1]
