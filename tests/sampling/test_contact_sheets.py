"""Which pictures are side by side, and what a sheet of them looks like."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from PIL import Image

from gsoft_diffusion.sampling import contact_sheets as contact_sheets_module
from gsoft_diffusion.sampling.contact_sheets import SHEET_PIXELS, SHEET_WIDTH, Row, contact_sheets, sheet_rows
from gsoft_diffusion.sampling.generation import Sample


def contact_sheet(rows: list[Row], title: str = "") -> Image.Image:
    (sheet,) = contact_sheets(rows, title)
    return sheet


@pytest.mark.parametrize(("captions", "lengths"), [([""], [8, 2, 8, 2]), (["", "base model"], [8, 8, 4] * 2)])
def test_sheet_rows_keep_prompts_apart(captions, lengths):
    image = Image.new("RGB", (8, 8))
    samples = [Sample(prompt, seed, image) for prompt in ("a", "b") for seed in range(10)]
    rows = sheet_rows([(caption, samples) for caption in captions], images_each=10)
    assert [len(row.images) for row in rows] == lengths
    assert [row.label for row in rows] == sorted(row.label for row in rows)
    assert list(chain(*(row.captions for row in rows)))[:: len(captions)] == [f"seed {s.seed}" for s in samples]


def test_captions_tell_columns_apart_by_whatever_name():
    sample = Sample("a", 3, Image.new("RGB", (8, 8)))
    (row,) = sheet_rows([("adapter", [sample]), ("base", [sample]), ("", [sample])], images_each=1)
    assert row.captions == ["seed 3 · adapter", "seed 3 · base", "seed 3"]


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

    monkeypatch.setattr(contact_sheets_module, "_draw_sheet", only_measured)
    given = [Row(str(number), [picture] * columns, ["caption"] * columns) for number in range(rows)]
    parts = list(contact_sheets(given, "title"))
    assert [row for part in parts for row in part] == given
    assert len(parts) == sheets
    assert all(width * height <= SHEET_PIXELS and width <= SHEET_WIDTH for width, height in sizes)
    assert SHEET_PIXELS < Image.MAX_IMAGE_PIXELS / 2


def test_large_pictures_are_shrunk_and_none_is_lost():
    sheet = np.asarray(contact_sheet([Row("label", colours("red", "lime", size=2048), ["1", "2"])]))
    for colour in ((255, 0, 0), (0, 255, 0)):
        assert np.all(sheet == colour, axis=-1).sum() == 1024 * 1024
