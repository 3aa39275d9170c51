"""Sizes, crops, flips and weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gsoft_diffusion.photos.crops import (
    CROPS,
    Variant,
    bucket_sizes,
    nearest_size,
    pixels,
    subject_weights,
    variants,
    view,
)
from gsoft_diffusion.photos.folder import Photo
from gsoft_diffusion.photos.image_files import open_image


def picture(width: int = 20, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, path: Path) -> Photo:
    image.save(path)
    return Photo(path, "a photo", image.size)


def half(width: int, height: int) -> Image.Image:
    """White in the left half."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def test_weights_follow_the_crop(tmp_path):
    half(64, 32).save(tmp_path / "mask.png")
    photo = Photo(tmp_path / "photo.png", "a", (64, 32), mask=tmp_path / "mask.png")

    def weights(place: float, flip: bool = False) -> list[float]:
        weights = subject_weights(photo, Variant((16, 16), place, flip), (4, 4), 0.25)
        assert weights.shape == (1, 4, 4)
        return weights[0, 0].tolist()

    assert weights(0.0) == [1, 1, 1, 1]
    assert weights(1.0) == [0.25] * 4
    assert weights(0.5) == [1, 1, 0.25, 0.25]
    assert weights(0.5, flip=True) == [0.25, 0.25, 1, 1]
    wide = subject_weights(photo, Variant((32, 16)), (8, 4), 0.25)
    assert wide[0].tolist() == [[1] * 4 + [0.25] * 4] * 4
    assert subject_weights(Photo(photo.path, "a", (64, 32)), Variant((32, 16)), (8, 4), 0.25).eq(1).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 32)])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (16, 16)])
def test_the_view_says_what_was_cropped(tmp_path, shape, size, place, flip):
    """As in SDXL's training: scale the (mirrored) photo, then cut the picture out at the edges that the view names."""
    ramp = np.linspace(0, 255, shape[0])[None, :, None] + np.linspace(0, 255, shape[1])[:, None, None]
    photo = saved(Image.fromarray((ramp / 2).astype(np.uint8).repeat(3, axis=2)), tmp_path / "photo.png")
    height, width, top, left, *target = view(photo, Variant(size, place, flip)).tolist()
    assert (width, height) == shape
    assert tuple(reversed(target)) == size
    image = open_image(photo.path)
    scale = max(across / side for across, side in zip(size, shape, strict=True))
    image = image.resize((round(shape[0] * scale), round(shape[1] * scale)), Image.Resampling.LANCZOS)
    image = ImageOps.mirror(image) if flip else image
    expected = np.asarray(image.crop((left, top, left + size[0], top + size[1])), dtype=float)
    found = ((pixels(photo, Variant(size, place, flip)) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).mean() < 4


def test_bucket_sizes_of_stable_diffusion():
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes
    assert {(768, 320), (320, 768), (640, 384), (256, 1024)} <= set(sizes)
    assert all(width % 64 == height % 64 == 0 and width * height <= 512**2 for width, height in sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)


@pytest.mark.parametrize(("resolution", "step"), [(64, 16), (96, 32), (1024, 64), (32, 4), (64, 64)])
def test_bucket_sizes_hold_the_square(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes
    assert all(resolution // 2 <= side <= 2 * resolution and side % step == 0 for size in sizes for side in size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 100), (512, 512)), ((3000, 2000), (640, 384)), ((2000, 3000), (384, 640)), ((1, 90), (256, 1024))],
)
def test_nearest_size(size, expected):
    assert nearest_size(size, bucket_sizes(512, 64)) == expected


def test_variants_are_finite_and_distinct():
    square = (16, 16)
    assert variants((10, 10), square, center_crop=False, random_flip=False) == [Variant(square)]
    assert variants((10, 20), square, center_crop=True, random_flip=False) == [Variant(square)]
    assert variants((10, 20), (16, 32), center_crop=False, random_flip=False) == [Variant((16, 32))]
    assert len(set(variants((10, 20), square, center_crop=False, random_flip=False))) == CROPS
    assert len(set(variants((10, 20), square, center_crop=False, random_flip=True))) == 2 * CROPS
    flipped = Variant(square, flip=True)
    assert variants((10, 10), square, center_crop=False, random_flip=True) == [Variant(square), flipped]


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (30, 20), (20, 30), (3, 500), (17, 16)])
@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("wanted", [(16, 16), (24, 8), (8, 28)])
def test_pixels_have_the_size_and_range(tmp_path, size, place, wanted):
    shown = pixels(saved(picture(*size), tmp_path / "0.png"), Variant(wanted, place))
    assert shown.shape == (3, wanted[1], wanted[0])
    assert shown.dtype == torch.float32
    assert shown.min() >= -1
    assert shown.max() <= 1


def test_pixels_stay_where_nothing_is_resized(tmp_path):
    photo = saved(picture(16, 24), tmp_path / "0.png")
    array = torch.from_numpy(np.array(open_image(photo.path))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels(photo, Variant((16, 16), 0.0)), array[:, :16])
    assert torch.equal(pixels(photo, Variant((16, 16), 1.0)), array[:, 8:])
    assert torch.equal(pixels(photo, Variant((16, 16), 0.5, flip=True)), array[:, 4:20].flip(-1))
    assert torch.equal(pixels(photo, Variant((16, 24))), array)
    assert torch.equal(pixels(photo, Variant((8, 24), 1.0)), array[:, :, 8:])
