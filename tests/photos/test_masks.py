"""Masks in files and in the transparency of photos."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.photos.folder import open_mask, read_folder
from gsoft_diffusion.photos.image_files import EXIF_ORIENTATION
from gsoft_diffusion.photos.masks import read_mask


def picture(width: int = 20, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def half(width: int, height: int) -> Image.Image:
    """White in the left half."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def test_masks_beside_photos_and_in_their_transparency(photos):
    half(64, 40).save(photos / "1-masklabel.png")
    transparent = picture(40, 64)
    transparent.putalpha(half(40, 64))
    transparent.save(photos / "2.png")
    opaque = picture(33, 32)
    opaque.putalpha(255)
    opaque.save(photos / "3.png")
    found = read_folder(photos, "--flag", "a")
    masks = {photo.path.name: photo.mask and photo.mask.name for photo in found.photos}
    assert masks == {"0.png": None, "1.png": "1-masklabel.png", "2.png": "2.png", "3.png": None}
    assert "2 with masks" in str(found)
    assert found.left_out == ("notes.txt",)
    for photo in found.photos[1:3]:
        assert np.array_equal(np.asarray(open_mask(photo)), np.asarray(half(*photo.size)))


def test_a_mask_file_goes_before_transparency(photos):
    transparent = picture(64, 40)
    transparent.putalpha(half(64, 40))
    transparent.save(photos / "1.png")
    half(64, 40).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "1-masklabel.png")
    photo = read_folder(photos, "--flag", "a").photos[1]
    assert photo.mask == photos / "1-masklabel.png"
    Image.new("L", (64, 40), 255).save(photos / "1-masklabel.png")  # nothing is left out, whatever the transparency
    assert read_folder(photos, "--flag", "a").photos[1].mask is None


@pytest.mark.parametrize("name", ["1-masklabel.PNG", "1-MaskLabel.png"])
def test_letter_case_does_not_matter(photos, name):
    half(64, 40).save(photos / name)
    assert read_folder(photos, "--flag", "a").photos[1].mask == photos / name


def indexed(palette: list[int], second: int = 1) -> Image.Image:
    """Index 0 in the right half and `second` in the left, with colours of its own."""
    image = Image.fromarray(np.where(np.asarray(half(64, 40)), second, 0).astype(np.uint8)).convert("P")
    image.putpalette(palette)
    return image


def opaque_left(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (64, 40), colour)
    image.putalpha(half(64, 40))
    return image


def in_grey(left: int, right: int, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.where(np.asarray(half(64, 40)), left, right).astype(dtype))


def colours(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (64, 40), right)
    image.paste(left, (0, 0, 32, 40))
    return image


@pytest.mark.parametrize(
    "mask",
    [
        half(64, 40),
        half(64, 40).convert("1"),
        half(64, 40).convert("RGB"),
        opaque_left((255, 255, 255)),
        opaque_left((90, 60, 30)),
        opaque_left((255, 255, 255)).convert("LA"),
        in_grey(1, 0),
        in_grey(1, 0, np.uint16),
        in_grey(255, 0, np.uint16),
        in_grey(65535, 0, np.uint16),
        indexed([0, 0, 0, 128, 0, 0]),
        indexed([0, 0, 0] + [7, 7, 7] * 14 + [192, 128, 128], 15),
        indexed([0, 0, 0, 255, 255, 255]),
        indexed([0, 0, 0, 1, 1, 1]),
        indexed([0, 0, 0, 0, 0, 0]),
        colours((0, 200, 0), (0, 0, 0)),
    ],
    ids=range(16),
)
def test_masks_as_tools_write_them(photos, mask):
    """Grey, one bit, transparent, labels, deep, indexed or in colour: all mark the left half."""
    mask.save(photos / "1-masklabel.png")
    found = read_folder(photos, "--flag", "a")
    assert np.array_equal(np.asarray(open_mask(found.photos[1])), np.asarray(half(64, 40)))
    assert "1 with masks" in str(found)


def test_shades_stay(photos):
    in_grey(200, 40).save(photos / "1-masklabel.png")
    mask = open_mask(read_folder(photos, "--flag", "a").photos[1])
    assert mask.getextrema() == (40, 200)


def test_a_palette_is_read_by_its_colours(photos):
    indexed([255, 255, 255, 0, 0, 0]).save(photos / "1-masklabel.png")
    mask = open_mask(read_folder(photos, "--flag", "a").photos[1])
    assert np.array_equal(np.asarray(mask), 255 - np.asarray(half(64, 40)))


@pytest.mark.parametrize("mask", [Image.new("L", (64, 40), 255), Image.new("RGBA", (64, 40), (255, 255, 255, 255))])
def test_a_white_mask_is_none_and_said(photos, mask):
    mask.save(photos / "1-masklabel.png")
    found = read_folder(photos, "--flag", "a")
    assert found.photos[1].mask is None
    assert "4 pictures, 1 with a mask that is white everywhere, which has no effect;" in str(found)


@pytest.mark.parametrize("alphas", [(200, 200), (250, 255), (10, 60)])
def test_an_even_transparency_is_no_mask(photos, alphas):
    image = picture(64, 40)
    image.putalpha(in_grey(*alphas))
    image.save(photos / "1.png")
    found = read_folder(photos, "--flag", "a")
    assert found.photos[1].mask is None
    assert "1 about equally transparent everywhere, so without a mask" in str(found)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("1-masklabel.png", half(40, 64), r"1-masklabel\.png: the mask has 40×64 pixels, but 1\.png has 64×40"),
        ("1-masklabel.png", Image.new("L", (64, 40)), r"1-masklabel\.png: black everywhere"),
        ("7-masklabel.png", half(64, 40), r"7-masklabel\.png: is the mask of no picture"),
        ("1-masklabel.jpg", half(64, 40), r"1-masklabel\.jpg: .* is called 1-masklabel\.png"),
        ("1.png", Image.new("RGBA", (4, 4)), r"1\.png: transparent everywhere"),
        ("1-masklabel.png", Image.new("L", (64, 40), 128), r"1-masklabel\.png: goes only from grey 128 to grey 128"),
        ("1-masklabel.png", in_grey(20, 0), r"1-masklabel\.png: goes only from grey 0 to grey 20 of 255"),
        ("1-masklabel.png", in_grey(255, 240), r"1-masklabel\.png: goes only from grey 240 to grey 255"),
        ("1-masklabel.png", opaque_left((0, 0, 0)), r"1-masklabel\.png: black on transparent is ambiguous"),
        ("1-masklabel.png", Image.new("RGBA", (64, 40)), r"1-masklabel\.png: transparent everywhere"),
        ("1-masklabel.png", colours((255, 0, 0), (0, 0, 255)), r"1-masklabel\.png: has several colours"),
        ("1-masklabel.png", Image.new("RGB", (64, 40), "red"), r"1-masklabel\.png: has several colours"),
        (
            "1-masklabel.png",
            Image.fromarray(np.tile(np.uint8([0, 1, 1, 255]), (40, 16))),
            r"1-masklabel\.png: holds the labels 0, 1 and 255",
        ),
    ],
)
def test_masks_that_are_wrong_are_named(photos, name, mask, message):
    mask.save(photos / name)
    with pytest.raises(UserError, match=message):
        read_folder(photos, "--flag", "a")


@pytest.mark.parametrize(("mode", "bytes_a_pixel"), [("1", 3), ("L", 3), ("RGB", 12)])
def test_a_large_mask_takes_little_memory(tmp_path, mode, bytes_a_pixel):
    side = 1000
    Image.linear_gradient("L").resize((side, side)).point(lambda value: 255 * (value > 127)).convert(mode).save(
        tmp_path / "x.png"
    )
    tracemalloc.start()
    try:
        mask = read_mask(tmp_path / "x.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert mask.getextrema() == (0, 255)
    assert peak < bytes_a_pixel * side**2  # of NumPy's


def test_a_mask_is_turned_like_its_photo(tmp_path):
    """The camera's EXIF data say that the photo lies on its side; the mask was painted over the upright one."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture(64, 40).save(tmp_path / "0.jpg", exif=exif)
    half(40, 64).save(tmp_path / "0-masklabel.png")
    (photo,) = read_folder(tmp_path, "--flag", "a").photos
    assert photo.size == open_mask(photo).size == (40, 64)


def test_a_mask_that_is_hardly_transparent_is_read_by_its_shades(photos):
    mask = half(64, 40).convert("RGBA")
    mask.putpixel((0, 0), (255, 255, 255, 250))
    mask.save(photos / "1-masklabel.png")
    assert np.array_equal(np.asarray(open_mask(read_folder(photos, "--flag", "a").photos[1])), np.asarray(half(64, 40)))


def test_a_mask_with_shades_and_transparency_is_refused(photos):
    mask = half(64, 40).convert("RGBA")
    mask.paste((0, 0, 0, 0), (60, 0, 64, 40))
    mask.save(photos / "1-masklabel.png")
    with pytest.raises(UserError, match=r"1-masklabel\.png: black and white and transparent"):
        read_folder(photos, "--flag", "a")


def test_a_mask_that_is_not_turned_as_its_photo_is(photos):
    orientation = Image.Exif()
    orientation[EXIF_ORIENTATION] = 6
    picture(40, 24).save(photos / "x.jpg", exif=orientation)
    half(40, 24).save(photos / "x-masklabel.png")
    with pytest.raises(
        UserError, match=r"x-masklabel\.png: .* 40×24 .* turned by EXIF data to have 24×40; turn the mask"
    ):
        read_folder(photos, "--flag", "a")


@pytest.mark.parametrize("name", ["1_mask.png", "1-Mask.png", "1mask.png"])
def test_masks_by_other_names_are_told_from_photos(photos, name):
    half(64, 40).save(photos / name)
    assert "1 used as a photo although named like a mask" in str(read_folder(photos, "--flag", "a"))
