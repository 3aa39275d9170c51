from __future__ import annotations

import json
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import numbered
from gsoft_diffusion.foundation.run_folder import METADATA_KEY
from gsoft_diffusion.sampling import pictures
from gsoft_diffusion.sampling.pictures import (
    Row,
    _characters,
    _font_for,
    contact_sheets,
    next_number,
    save_png,
    slug,
)


def contact_sheet(rows: list[Row], title: str = "") -> Image.Image:
    (sheet,) = contact_sheets(rows, title)
    return sheet


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


def colours(*names: str, size: int = 64) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), name) for name in names]


def test_small_pictures_are_enlarged_in_order():
    rows = [Row("first", colours("red", "lime"), ["1", "2"]), Row("second", colours("blue", "black"), ["3", "4"])]
    pixels = np.asarray(contact_sheet(rows))
    reds, limes, blues = (
        np.argwhere(np.all(pixels == colour, axis=-1)) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    )
    assert len(reds) == len(limes) == len(blues) == 192 * 192
    assert reds[:, 1].max() < limes[:, 1].min()
    assert reds[:, 0].max() < blues[:, 0].min()


def test_large_pictures_stay_as_they_are():
    sheet = contact_sheet([Row("label", colours("red", size=256), ["caption"])])
    assert np.all(np.asarray(sheet) == (255, 0, 0), axis=-1).sum() == 256 * 256


def test_pictures_that_are_not_square_leave_no_gaps():
    square, wide, tall = (
        contact_sheet([Row("label", [Image.new("RGB", size, "red")] * 2, ["1", "2"])])
        for size in ((400, 400), (400, 200), (200, 400))
    )
    assert wide.size == (square.width, square.height - 200)
    assert tall.size == (square.width - 2 * 200, square.height)


def test_labels_are_drawn_and_long_ones_do_not_touch_the_pictures():
    def ink_outside(label: str) -> int:
        sheet = np.asarray(contact_sheet([Row(label, colours("red"), [label])]))
        assert np.all(sheet == (255, 0, 0), axis=-1).sum() == 192 * 192
        return int((sheet.sum(axis=-1) < 300).sum())

    assert ink_outside("") < ink_outside("a sks dog") < ink_outside("a sks dog " * 100)
    assert ink_outside("x" * 1000) > 0
    assert ink_outside("two\nlines \x00 🐶") > 0


def test_rows_of_different_lengths():
    contact_sheet([Row("a", colours("red"), ["1"]), Row("b", colours("red", "lime"), ["1", "2"])], title="title")


@pytest.mark.parametrize(
    ("rows", "columns", "size", "sheets"),
    [
        (25, 8, (1024, 1024), 7),
        (60, 1, (64, 64), 1),
        (3, 2, (4096, 4096), 1),
        (2, 40, (512, 512), 1),
        (3000, 1, (64, 64), 4),
        (1, 1, (9000, 30), 1),
    ],
)
def test_sheets_stay_below_what_is_opened_again(monkeypatch, rows, columns, size, sheets):
    """By their pixels, whatever the number of rows and columns, and the size of pictures."""
    sizes, picture = [], Image.new("RGB", size, "red")

    def only_measured(part, layout):
        sizes.append((layout.width, layout.head_height() + sum(map(layout.height, part))))
        return part

    monkeypatch.setattr(pictures, "_draw_sheet", only_measured)
    given = [Row(str(number), [picture] * columns, ["caption"] * columns) for number in range(rows)]
    parts = list(contact_sheets(given, "title"))
    assert [row for part in parts for row in part] == given
    assert len(parts) == sheets
    assert all(width * height <= pictures.SHEET_PIXELS and width <= pictures.SHEET_WIDTH for width, height in sizes)
    assert pictures.SHEET_PIXELS < Image.MAX_IMAGE_PIXELS / 2


def test_large_pictures_are_shrunk_and_none_is_lost():
    sheet = np.asarray(contact_sheet([Row("label", colours("red", "lime", size=2048), ["1", "2"])]))
    for colour in ((255, 0, 0), (0, 255, 0)):
        assert np.all(sheet == colour, axis=-1).sum() == 1024 * 1024


def test_names_of_several_sheets():
    assert [numbered("sheet.png", number) for number in (1, 2, 10)] == ["sheet.png", "sheet_2.png", "sheet_10.png"]


def has_ink(text: str) -> np.ndarray:
    return np.asarray(contact_sheet([Row(text, colours("red"), [""])]))[:20].min(axis=-1) < 128


@pytest.mark.parametrize("text", ["собака", "σκύλος", "chien à l'été", "dog × 0.5 …", "כלב"])
def test_other_letters_are_no_boxes(text, caplog):
    """As a box is always the same, letters that differ are drawn as such; and nothing is said."""
    boxes = has_ink("\ue000" * len(text))
    assert has_ink(text).any()
    assert not np.array_equal(has_ink(text), boxes)
    assert _characters(_font_for(text)).issuperset(ord(letter) for letter in text if letter != " ")
    assert "no font" not in "".join(record.getMessage() for record in caplog.records if text in record.getMessage())


def test_letters_that_no_font_has_are_said(caplog, monkeypatch):
    monkeypatch.setattr(pictures, "_system_fonts", list)
    has_ink("a photo of 犬")
    assert "no font on this machine has 犬: contact sheets show boxes instead" in caplog.text


def test_plain_letters_need_no_other_font():
    assert _font_for("a sks dog: 7 * 8 ~ {0}") is None
