"""Where the subject is on a photo: a mask file beside it, or the transparency of the photo itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.text_files import composed
from gsoft_diffusion.photos.colours import eight_bits
from gsoft_diffusion.photos.image_files import opened, read_picture, upright

MASK_END = "-masklabel"  # as OneTrainer names mask files
MIDDLE, CONTRAST = 128, 64  # of 255: how bright the subject must be at least, and how much darker the rest
NEARLY_GREY = 16  # by how much the channels of a grey may differ


def is_mask(path: Path) -> bool:
    """Whether the name is a mask's."""
    return path.stem.lower().endswith(MASK_END)


def find_masks(images: Sequence[Path], others: Sequence[Path]) -> dict[Path, Path]:
    """The mask file of each picture that has one: `dog-masklabel.png` for `dog.jpg`.

    images: the pictures. others: the other files beside them. Raises UserError for a mask without a picture, and as
    `beside`.
    """
    masks = beside(images, others, f"{MASK_END}.png")
    for path in others:
        if is_mask(path) and path not in masks.values():
            picture = path.stem[: -len(MASK_END)]
            raise UserError(
                f"{path}: is the mask of no picture; the mask of {picture} is called {picture}{MASK_END}.png"
            )
    return masks


def beside(images: Sequence[Path], others: Sequence[Path], end: str) -> dict[Path, Path]:
    """The file `<stem><end>` of each picture that has one.

    images: the pictures. others: the other files, in the same folders.
    end: of the name, in small letters; in files it may be in capitals.

    Raises UserError for one that two pictures share, and for two of one picture.
    """
    named: dict[tuple[Path, str], list[Path]] = {}
    for image in images:
        named.setdefault((image.parent, composed(image.stem)), []).append(image)
    found: dict[Path, Path] = {}
    for path in others:
        if path.name[-len(end) :].lower() != end:
            continue
        sharing = named.get((path.parent, composed(path.name[: -len(end)])), [])
        if len(sharing) > 1:
            names = " and ".join(image.name for image in sharing)
            raise UserError(f"{path}: belongs to {names}; give the pictures different names")
        if sharing and sharing[0] in found:
            raise UserError(f"{path}: {sharing[0].name} has {found[sharing[0]].name} already; remove one of them")
        found |= dict.fromkeys(sharing, path)
    return found


def read_mask(path: Path) -> Image.Image:
    """A mask file in shades from black (the subject is not there) to white (it is there).

    White on black is taken as it is. With transparency the opacity is the mask; of labels 0 and 1, and of black and one
    other colour, the second is the subject. Raises UserError naming the file for what could mean several things.
    """
    with opened(path) as image:
        mask, _ = upright(path, image)
    if mask.mode.startswith("I;16"):
        deep = np.asarray(mask)
        mask = Image.fromarray(deep.astype(np.uint8)) if deep.max() <= 255 else eight_bits(mask)
    return _from_opacity(mask, path) or _from_colours(mask, path)


def read_opacity(path: Path) -> Image.Image:
    """The mask that a photo with transparency is itself. Raises UserError if it has none, or as `read_picture`."""
    opacity = read_picture(path).opacity
    if opacity is None:
        raise UserError(f"{path}: was transparent when the run began, and no longer is")
    return opacity


def trouble(mask: Image.Image) -> str:
    """Why this mask does not separate the subject from the rest; "" if it does."""
    darkest, brightest = _range(mask)
    if brightest == 0:
        return "black everywhere: white marks the subject"
    if brightest < MIDDLE or brightest - darkest < CONTRAST:
        return f"goes only from grey {darkest} to grey {brightest} of 255: white marks the subject, black the rest"
    return ""


def is_white(mask: Image.Image) -> bool:
    """Whether the mask marks everything, which changes nothing."""
    return _range(mask)[0] == 255


def _range(image: Image.Image) -> tuple[int, int]:
    array = np.asarray(image)
    return int(array.min()), int(array.max())


def _from_opacity(image: Image.Image, path: Path) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    image = image.convert("RGBA")
    opacity = image.getchannel("A")
    faintest, strongest = _range(opacity)
    if strongest == 0:
        raise UserError(f"{path}: transparent everywhere")
    if strongest - faintest < CONTRAST and strongest >= MIDDLE:  # says nothing, so the colours must
        return None
    seen = np.asarray(image)[np.asarray(opacity) >= MIDDLE][:, :3]
    if len(seen) and np.ptp(seen, axis=1).max() <= NEARLY_GREY and seen.min() <= NEARLY_GREY:
        if seen.max() <= NEARLY_GREY:
            raise UserError(f"{path}: black on transparent is ambiguous; paint the subject white, and the rest black")
        if ((seen.max(axis=1) <= NEARLY_GREY) | (seen.min(axis=1) >= 255 - NEARLY_GREY)).all():
            raise UserError(
                f"{path}: black and white and transparent, and it is unclear which marks the subject; save it without "
                "transparency, the subject white, and the rest black"
            )
    return opacity


def _from_colours(image: Image.Image, path: Path) -> Image.Image:
    if image.mode in ("1", "L"):
        return _from_labels(np.asarray(image.convert("L")), path)
    rgb = image.convert("RGB")
    colours = np.asarray(rgb)
    indices = np.asarray(image)
    if image.mode == "P" and np.ptp(indices) and (colours == colours[0, 0]).all():  # a palette that says nothing
        return _from_labels(indices, path)
    if np.ptp(colours, axis=2).max() <= NEARLY_GREY:
        return _from_labels(np.asarray(rgb.convert("L")), path)
    different = rgb.getcolors(2) or []
    black = [colour for _, colour in different if max(colour) <= NEARLY_GREY]  # type: ignore[arg-type]
    if len(different) != 2 or not black:
        raise UserError(
            f"{path}: has several colours, and it is unclear which marks the subject; paint the subject white on black"
        )
    return Image.fromarray(np.where((colours == black[0]).all(axis=2), 0, 255).astype(np.uint8))


def _from_labels(values: np.ndarray, path: Path) -> Image.Image:
    """Shades of grey as they are; numbers 0 and 1 as black and white."""
    values = values.astype(np.uint8, copy=False)
    different = {level for level, count in enumerate(Image.fromarray(values).histogram()) if count}
    if different == {0, 1}:
        values = values * 255
    elif different == {0, 1, 255}:
        raise UserError(f"{path}: holds the labels 0, 1 and 255; paint the subject white, and the rest black")
    return Image.fromarray(values)
