"""What is written of pictures, and under which names."""

from __future__ import annotations

import json
from typing import BinaryIO

import pytest
from PIL import Image

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import METADATA_KEY
from gsoft_diffusion.sampling.pictures import next_number, save_png, slug


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a sks dog on the beach", "a-sks-dog-on-the-beach"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "picture"),
        ("", "picture"),
        ("🐶🐶", "picture"),
        ("Ünïcode Straße\n\t\x00\x1b[31m", "unicode-strae-31m"),
        ("CON", "con"),
        ("a" * 100, "a" * 60),
        ("a" * 59 + " b", "a" * 59),
    ],
)
def test_slugs_are_safe_names(text, expected):
    assert slug(text) == expected


def test_a_png_carries_its_settings(tmp_path):
    path = tmp_path / "new" / "0000_a.png"
    metadata = {"prompt": 'sks "dog" 🐶\n', "seed": 42}
    assert save_png(Image.new("RGB", (4, 4), "red"), tmp_path / "new", "{}_a.png", 0, metadata) == path
    with Image.open(path) as image:
        assert json.loads(image.text[METADATA_KEY]) == metadata
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_nothing_is_written_over(tmp_path):
    """Where another command was faster with a name, the number goes on."""
    path = tmp_path / "0007_mine.png"
    path.write_text("precious")
    assert save_png(Image.new("RGB", (4, 4)), tmp_path, "{}_mine.png", 7, {}) == tmp_path / "0008_mine.png"
    assert path.read_text() == "precious"


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(image: Image.Image, file: BinaryIO, *arguments: object, **options: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.png: No space left on device"):
        save_png(Image.new("RGB", (2, 2)), tmp_path, "{}_a.png", 0, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "file", "{}_a.png", 0, {})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], 0),
        (["0000_seed1_a.png"], 1),
        (["0007_seed1_a.png", "0003_seed1_a.png", "notes.txt", "2024-holiday.png"], 8),
        (["contact_sheet_0012.png"], 13),
        (["10000_seed1_a.png", "9999_seed1_a.png"], 10001),
    ],
)
def test_numbers_go_on(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()
    assert next_number(tmp_path) == expected


def test_numbers_start_at_0_in_a_folder_that_is_not_there(tmp_path):
    assert next_number(tmp_path / "new") == 0
