"""Reading picture files: formats, orientation, transparency, damage."""

from __future__ import annotations

import errno
import os
import struct

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.photos.image_files import open_image, opened, read_picture

HEIC = b"\0\0\0\x18ftypheic" + bytes(12)


def picture(width: int = 20, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    smooth = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    smooth.save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert np.abs(np.asarray(image, int) - np.asarray(smooth, int)).max() <= 8


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "picture.HEIC"
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    pillow_heif.from_pillow(smooth).save(path, quality=95)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert np.abs(np.asarray(image, int) - np.asarray(smooth, int)).max() <= 8


def test_a_heic_by_another_name_is_read_for_what_it_is(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(picture(64, 64)).save(tmp_path / "a.heic")
    path = (tmp_path / "a.heic").rename(tmp_path / "a.jpg")
    assert open_image(path).size == (64, 64)


def test_a_damaged_heic_is_named(tmp_path):
    pytest.importorskip("pillow_heif")
    path = tmp_path / "picture.heic"
    path.write_bytes(HEIC)
    with pytest.raises(UserError, match=r"picture\.heic: damaged"):
        open_image(path)


def test_a_file_that_holds_a_program_is_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for anew
    path = tmp_path / "dog.png"
    picture().save(path, "EPS")
    with pytest.raises(UserError, match=r"dog\.png: damaged or not a picture"):
        open_image(path)
    assert not ran.exists()


@pytest.mark.parametrize(("orientation", "turned"), [(0, False), (1, False), (6, True), (9, False)])
def test_only_what_exif_defines_turns_a_picture(tmp_path, orientation, turned):
    path, exif = tmp_path / "picture.jpg", Image.Exif()
    exif[0x0112] = orientation
    picture().save(path, exif=exif)
    assert read_picture(path).turned == turned


def test_heic_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    path = tmp_path / "picture.heic"
    path.write_bytes(HEIC)
    with pytest.raises(UserError, match=r"picture\.heic.*pip install pillow-heif"):
        open_image(path)


def test_transparent_becomes_white(tmp_path):
    path = tmp_path / "transparent.png"
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(path)
    upright = open_image(path)
    assert upright.getpixel((0, 0)) == (255, 0, 0)
    assert upright.getpixel((1, 1)) == (255, 255, 255)


def test_transparent_palette_becomes_white(tmp_path):
    path = tmp_path / "palette.png"
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 1)
    image.save(path, transparency=0)
    upright = open_image(path)
    assert upright.getpixel((0, 0)) == (0, 255, 0)
    assert upright.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(path)
    image = open_image(path)
    assert image.getpixel((0, 0)) == (127, 127, 127)


def test_cmyk(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    red, green, blue = open_image(path).getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "huge"])
def test_damaged_files_are_named(tmp_path, damage, monkeypatch):
    path = tmp_path / "broken.png"
    picture(60, 60).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a picture")
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"broken\.png"):
        open_image(path)


def test_a_tiff_whose_next_picture_is_empty_is_damaged(tmp_path):
    path = tmp_path / "broken.tiff"
    picture().save(path)
    content = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, directory)
    struct.pack_into("<I", content, directory + 2 + 12 * entries, len(content))  # where the next directory is
    path.write_bytes(content + struct.pack("<HI", 0, 0))
    with pytest.raises(UserError, match=r"broken\.tiff: damaged or not a picture; .*Missing dimensions"):
        open_image(path)


@pytest.mark.parametrize("error", [EOFError, IndexError, KeyError, OverflowError, TypeError, struct.error])
def test_whatever_pillow_raises_while_it_turns_a_picture_is_damage(tmp_path, error, monkeypatch):
    """As it does for some EXIF data in WebP."""

    def broken(image: Image.Image) -> Image.Image:
        raise error("required argument is not an integer")

    path = tmp_path / "broken.png"
    picture().save(path)
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    with pytest.raises(UserError, match=r"broken\.png: damaged or not a picture; .*required argument"):
        open_image(path)


@pytest.mark.parametrize("when", ["Path.open", "ImageOps.exif_transpose"])
def test_a_file_that_the_system_does_not_read_is_not_called_damaged(tmp_path, monkeypatch, when):
    """Before its kind is known, and in the middle of its pixels."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "dog.png")

    path = tmp_path / "dog.png"
    picture().save(path)
    monkeypatch.setattr(f"gsoft_diffusion.photos.image_files.{when}", refuse)
    with pytest.raises(UserError, match=r"dog\.png: cannot be read \(Input/output error\); correct that, or remove"):
        open_image(path)


def test_errors_of_who_uses_the_picture_are_their_own(tmp_path):
    path = tmp_path / "whole.png"
    picture().save(path)
    with pytest.raises(ValueError, match="mine"), opened(path):
        raise ValueError("mine")
