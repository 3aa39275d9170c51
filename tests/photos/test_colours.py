"""Colours of files in other spaces than sRGB."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import icc_profiles
import numpy as np
import pytest
from PIL import Image, ImageCms

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.photos.folder import read_folder
from gsoft_diffusion.photos.image_files import open_image, read_picture

P3 = icc_profiles.rgb("Display P3", icc_profiles.DISPLAY_P3)
RED, RED_IN_P3 = (230, 40, 30), (211, 61, 46)


def near(found: object, wanted: tuple[int, ...], by: int = 2) -> bool:
    return bool(np.abs(np.subtract(found, wanted)).max() <= by)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_display_p3(tmp_path, suffix):
    path = tmp_path / f"red.{suffix}"
    Image.new("RGB", (16, 16), RED_IN_P3).save(path, icc_profile=P3, quality=100)
    picture = read_picture(path)
    assert near(picture.image.getpixel((8, 8)), RED, 4 if suffix in ("jpg", "webp") else 2)
    assert picture.colours == "converted to sRGB from Display P3"


def test_display_p3_in_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    heif = pillow_heif.from_pillow(Image.new("RGB", (64, 64), RED_IN_P3))
    heif[0].info["icc_profile"] = P3
    heif.save(tmp_path / "red.heic", quality=100)
    assert near(open_image(tmp_path / "red.heic").getpixel((32, 32)), RED, 6)


def test_a_folder_says_how_many(tmp_path):
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png", icc_profile=P3 if number else None)
    assert "3 pictures, 2 converted to sRGB from Display P3" in str(read_folder(tmp_path, "--flag", "a"))


def test_transparency_survives(tmp_path):
    image = Image.new("RGBA", (2, 1), (*RED_IN_P3, 255))
    image.putpixel((1, 0), (*RED_IN_P3, 77))
    image.save(tmp_path / "0.png", icc_profile=P3)
    found = read_picture(tmp_path / "0.png").image
    assert found.getchannel("A").tobytes() == bytes([255, 77])
    assert near(found.getpixel((1, 0))[:3], RED)


def test_a_palette_has_the_profiles_colours(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED_IN_P3])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "0.png", icc_profile=P3, transparency=0)
    found = read_picture(tmp_path / "0.png").image
    assert near(found.getpixel((1, 1)), (*RED, 255))
    assert found.getpixel((0, 0))[3] == 0


@pytest.mark.parametrize(
    "profile",
    [icc_profiles.rgb("mine", icc_profiles.SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()],
)
def test_pictures_in_srgb_stay_bit_for_bit(tmp_path, profile):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png", icc_profile=profile)
    picture = read_picture(tmp_path / "0.png")
    assert np.array_equal(np.asarray(picture.image), noise)
    assert picture.colours == ""


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey(tmp_path, mode):
    """Half of the light, 0.5, is level 128 by a gamma of 1, and level 188 in sRGB."""
    profile = icc_profiles.grey("linear", 1.0)
    Image.new(mode, (4, 4), 128 if mode == "L" else (128, 9)).save(tmp_path / "0.png", icc_profile=profile)
    picture = read_picture(tmp_path / "0.png")
    assert near(picture.image.getpixel((0, 0)), (188, 188, 188) if mode == "L" else (188, 188, 188, 9))
    assert picture.colours == "converted to sRGB from linear"


def test_sixteen_bits_of_grey_with_a_profile(tmp_path):
    deep = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    deep.save(tmp_path / "0.png", icc_profile=icc_profiles.grey("linear", 1.0))
    assert near(open_image(tmp_path / "0.png").getpixel((0, 0)), (188, 188, 188))


def test_grey_pictures_with_a_profile_for_colours(tmp_path):
    """As programs leave them that take the colours out of a picture and keep its profile."""
    Image.new("L", (4, 4), 128).save(tmp_path / "0.png", icc_profile=P3)
    picture = read_picture(tmp_path / "0.png")
    assert near(picture.image.getpixel((0, 0)), (128, 128, 128))


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk(tmp_path, suffix):
    """All inks together are green by the profile, and black without it."""
    path = tmp_path / f"0.{suffix}"
    Image.new("CMYK", (8, 8), (255, 255, 255, 255)).save(
        path, icc_profile=icc_profiles.cmyk("four greens"), quality=100
    )
    picture = read_picture(path)
    red, green, blue = picture.image.getpixel((4, 4))
    assert green > red + 50
    assert green > blue + 50
    assert picture.colours == "converted to sRGB from four greens"
    Image.new("CMYK", (8, 8), (255, 255, 255, 255)).save(path, quality=100)
    picture = read_picture(path)
    assert near(picture.image.getpixel((4, 4)), (0, 0, 0))
    assert picture.colours == "converted from CMYK without a colour profile (colours are approximate)"


def test_lab(tmp_path):
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "0.tif")
    picture = read_picture(tmp_path / "0.tif")
    assert picture.image.mode == "RGB"
    assert picture.colours == "converted to sRGB from CIELAB"


@pytest.mark.parametrize(
    "profile", [b"no profile", P3[:200], P3[:140] + b"\xff" * 60 + P3[200:], icc_profiles.grey("g", 1)]
)
def test_a_broken_or_misplaced_profile_is_said_and_left_out(tmp_path, profile):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "0.png", icc_profile=profile)
    picture = read_picture(tmp_path / "0.png")
    assert picture.image.getpixel((0, 0)) == RED
    assert picture.colours == "taken as sRGB because of a colour profile that is broken or misplaced"


def test_a_profiles_name_cannot_steer_the_terminal(tmp_path):
    Image.new("RGB", (4, 4), RED).save(
        tmp_path / "0.png", icc_profile=icc_profiles.rgb("\x1b[2Jx" * 99, icc_profiles.DISPLAY_P3)
    )
    colours = read_picture(tmp_path / "0.png").colours
    assert "\x1b" not in colours
    assert len(colours) < 100


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_channel_are_refused(tmp_path, mode):
    path: Path = tmp_path / "deep.tif"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(UserError, match=r"deep\.tif: has 32 bits a channel"):
        open_image(path)


def png_with(path: Path, chunk: bytes, content: bytes) -> None:
    """A red PNG with a chunk after its header."""
    Image.new("RGB", (16, 16), RED).save(path)
    data = path.read_bytes()
    whole = struct.pack(">I", len(content)) + chunk + content + struct.pack(">I", zlib.crc32(chunk + content))
    path.write_bytes(data[:33] + whole + data[33:])


P3_PRIMARIES = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_PRIMARIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@pytest.mark.parametrize(
    ("chunk", "numbers", "other"),
    [
        (b"gAMA", (45455,), False),
        (b"gAMA", (100000,), True),
        (b"cHRM", SRGB_PRIMARIES, False),
        (b"cHRM", P3_PRIMARIES, True),
    ],
)
def test_chunks_of_other_colours_are_said(tmp_path, chunk, numbers, other):
    png_with(tmp_path / "red.png", chunk, struct.pack(f">{len(numbers)}I", *numbers))
    picture = read_picture(tmp_path / "red.png")
    assert picture.colours == ("taken as sRGB although its gAMA, cHRM or nclx entry says otherwise" if other else "")
    assert picture.image.getpixel((8, 8)) == RED


@pytest.mark.parametrize(
    ("primaries", "curve", "other"), [(1, 13, False), (12, 13, True), (9, 16, True), (9, 18, True)]
)
def test_codes_of_other_colours_in_heic_are_said(tmp_path, monkeypatch, primaries, curve, other):
    pillow_heif = pytest.importorskip("pillow_heif")
    monkeypatch.setattr(pillow_heif.options, "SAVE_NCLX_PROFILE", True)
    heif = pillow_heif.from_pillow(Image.new("RGB", (64, 64), RED))
    codes = {"color_primaries": primaries, "transfer_characteristics": curve, "matrix_coefficients": 6}
    heif.save(tmp_path / "red.heic", quality=100, **codes)
    assert bool(read_picture(tmp_path / "red.heic").colours) is other
