"""How photos are shown to the model: in which sizes, which part of them, mirrored or not, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gsoft_diffusion.photos.folder import Photo, Size, open_mask
from gsoft_diffusion.photos.image_files import open_image

CROPS = 5  # places along the side that a crop leaves out something of, for a random crop to choose from


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """Sizes with at most `resolution²` pixels and sides that are multiples of `step`, from 1:4 to 4:1.

    resolution: side in pixels of the square. step: in pixels; it divides `resolution`.

    For every side from half to twice the resolution the largest other side that fits.
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
    """All the ways in which augmentation may show a photo: finitely many, so that all can be cached.

    photo, size: of the photo and of the picture to make of it, (width, height) in pixels.
    center_crop: crop in the middle only. random_flip: mirrored as well.
    """
    same_shape = photo[0] * size[1] == photo[1] * size[0]
    places = [0.5] if center_crop or same_shape else [index / (CROPS - 1) for index in range(CROPS)]
    return [Variant(size, place, flip) for place in places for flip in ((False, True) if random_flip else (False,))]


def pixels(photo: Photo, variant: Variant) -> Tensor:
    """The photo as the variant shows it: (3, height, width), float32, in [-1, 1].

    photo: its file is read anew. variant: the size, the part and whether it is mirrored. Raises UserError as
    `open_image`.
    """
    image = crop(open_image(photo.path), variant, variant.size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def view(photo: Photo, variant: Variant) -> Tensor:
    """(6,): height and width of the photo, top and left edge of the crop, height and width of the picture.

    photo: whose upright size counts. variant: how it is shown.

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

    photo, variant: what is shown, and how. A photo without a mask weighs 1 everywhere.
    size: width and height of the latents, onto which the mask is averaged.
    unmasked_weight: of places outside of the subject.
    """
    if photo.mask is None:
        return torch.ones(1, size[1], size[0])
    mask = torch.from_numpy(np.array(crop(open_mask(photo), variant, size, Image.Resampling.BOX)))[None].float() / 255
    return unmasked_weight + (1 - unmasked_weight) * mask


def crop(image: Image.Image, variant: Variant, size: Size, resampling: Image.Resampling) -> Image.Image:
    """The largest part of the variant's shape at its place, scaled, and mirrored if asked for.

    image: the whole picture, or its mask.
    variant: its size gives the shape only.
    size: width and height of the result, in pixels.
    resampling: Pillow's filter.
    """
    image = image.resize(size, resampling, box=_part(image.size, variant))
    return ImageOps.mirror(image) if variant.flip else image


def _part(size: Size, variant: Variant) -> tuple[float, float, float, float]:
    """The part of a photo of this size that the variant shows: left, top, right and bottom edge."""
    (width, height), (across, down) = size, variant.size
    part = min(width, height * across / down), min(height, width * down / across)
    left, top = (variant.place * (length - side) for length, side in zip(size, part, strict=True))
    return left, top, left + part[0], top + part[1]
