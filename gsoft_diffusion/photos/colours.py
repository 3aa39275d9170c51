"""Colours of picture files as the models know them: 8 bits of sRGB, converted by the profile that the file carries."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from gsoft_diffusion.foundation.errors import printable

SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC's names of what a profile is for, and Pillow's modes
GREYS = ("1", "L", "LA", "La")
# gAMA, and cHRM: white, red, green and blue; and by how much rounding may change them.
SRGB_CHUNKS, NEAR = (1 / 2.2, 0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06), 0.02
# In HEIC, by ITU-T H.273: BT.709's primaries, and curves like sRGB's; 2 means that nothing is known.
SRGB_CODES = {"color_primaries": (1, 2), "transfer_characteristics": (13, 1, 2, 6)}
ROUNDING = 2  # levels of 255 by which profiles that mean sRGB differ
LONGEST = 40  # characters of a profile's name


def to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """The picture in RGB, or in RGBA if it has transparency, and what was done to its colours: "" if nothing."""
    profile, said = image.info.get("icc_profile"), ""
    if image.mode.startswith("I;16"):
        image, said = eight_bits(image), "converted from 16 bits of grey to 8"
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        alpha = image.convert("RGBA").getchannel("A")
    colours, converted = _colours(image, profile)
    if alpha is not None:
        colours.putalpha(alpha)
    return colours, converted or said


def eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey scaled to 8, where Pillow would clip them."""
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))


def _colours(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    if image.mode == "LAB":
        return _applied(_from_lab(), image), "converted to sRGB from CIELAB"
    if image.mode == "CMYK":
        mode, without = "CMYK", "converted from CMYK without a colour profile (colours are approximate)"
    else:
        mode, without = ("L" if image.mode in GREYS else "RGB"), ""
    if not profile:
        return image.convert("RGB"), without or _said_otherwise(image)
    try:
        space, name = _described(profile)
        if mode == "L" and space == "RGB":
            mode = "RGB"
        if space != mode:
            raise ValueError
        transform = _transform(profile, mode)
        if transform is None:
            return image.convert("RGB"), ""
        return _applied(transform, image.convert(mode)), f"converted to sRGB from {name}"
    except (OSError, ValueError, ImageCms.PyCMSError):
        return image.convert("RGB"), without or "taken as sRGB because of a colour profile that is broken or misplaced"


def _said_otherwise(image: Image.Image) -> str:
    """What to say of a file without a profile that tells of other colours than sRGB's in another way."""
    info = image.info
    said = (info.get("gamma"), *info.get("chromaticity", ()))
    png = all(value is None or abs(value - srgb) < NEAR for value, srgb in zip(said, SRGB_CHUNKS, strict=False))
    nclx = info.get("nclx_profile") or {}
    heic = all(nclx.get(name, codes[0]) in codes for name, codes in SRGB_CODES.items())
    same = ("srgb" in info or png) and heic
    return "" if same else "taken as sRGB although its gAMA, cHRM or nclx entry says otherwise"


def _described(profile: bytes) -> tuple[str, str]:
    """Pillow's mode for the profile's colours, and its name. Raises OSError, ValueError or PyCMSError."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    name = printable(" ".join(ImageCms.getProfileDescription(opened).split()))[:LONGEST]
    return SPACES.get(opened.profile.xcolor_space, ""), name or "a profile without a name"


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from pictures of this mode to sRGB; None if it would hardly change them."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 256 if mode == "L" else 9).round().astype(np.uint8)
    colours = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    sample = Image.fromarray(colours)
    before, after = (np.asarray(each.convert("RGB"), int) for each in (sample, _applied(transform, sample)))
    return transform if np.abs(before - after).max() > ROUNDING else None


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "it is only where the picture is changed in place"
    return converted


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
