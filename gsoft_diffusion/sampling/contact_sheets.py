"""Contact sheets: pictures of prompts and seeds in labelled rows, on as many sheets as it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image, ImageDraw

from gsoft_diffusion.sampling.lettering import LINE, text_lines
from gsoft_diffusion.sampling.pictures import PictureFile

PICTURES_A_ROW = 8
SHEET_PIXELS = 40_000_000  # of a sheet; Pillow warns of pictures above 89 million and refuses twice as many
# Pixels of a picture's longer side on a sheet: labels can be read from the first on, and the second is large enough.
CELL, LARGEST_CELL = 192, 1024
SHEET_WIDTH = 8300  # pixels: eight of the largest cells; more in a row are made smaller
MARGIN = 8
PAPER, INK, FAINT = "white", "black", "dimgray"


class Shown(Protocol):
    """What contact sheets show: a `Sample`, or one whose picture is in a file."""

    @property
    def prompt(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def image(self) -> Image.Image | PictureFile: ...


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet: a label above, pictures in line, a caption under each."""

    label: str
    images: Sequence[Image.Image | PictureFile]
    captions: Sequence[str]


def sheet_rows(columns: Sequence[tuple[str, Sequence[Shown]]], images_each: int) -> list[Row]:
    """Rows of a contact sheet from the pictures of one or more models, the same prompts and seeds side by side.

    columns: for each model what its captions say besides the seed, if anything, and its pictures, in the same order of
    prompts and seeds.
    images_each: pictures that follow each other with the same prompt; what is too many for a row goes on in the next.
    """
    groups = list(zip(*(pictures for _, pictures in columns), strict=True))
    together = max(1, PICTURES_A_ROW // len(columns))
    rows = []
    for start in range(0, len(groups), images_each):
        same_prompt = groups[start : start + images_each]
        for at in range(0, len(same_prompt), together):
            group = same_prompt[at : at + together]
            images = [sample.image for samples in group for sample in samples]
            captions = [
                f"seed {sample.seed}" + (f" · {caption}" if caption else "")
                for samples in group
                for (caption, _), sample in zip(columns, samples, strict=True)
            ]
            rows.append(Row(group[0][0].prompt, images, captions))
    return rows


def contact_sheets(rows: Sequence[Row], title: str = "") -> Iterator[Image.Image]:
    """The rows on white paper, on as many sheets as it takes to keep each below `SHEET_PIXELS`.

    Small pictures are enlarged to at least 192 pixels, large ones shrunk to at most 1024.

    rows: at least one, with at least one picture.
    title: above the rows of every sheet; none if empty.

    Yields each sheet once it is drawn.
    """
    layout = _Layout.of(rows, title)
    for part in layout.parts(rows):
        yield _draw_sheet(part, layout)


@dataclass(frozen=True)
class _Layout:
    """What the sheets of some rows have in common: sides of a cell, the factor of its picture, and of the sheet."""

    cell: tuple[int, int]
    factor: float
    width: int
    heading: list[tuple[str, Any]]

    @classmethod
    def of(cls, rows: Sequence[Row], title: str) -> _Layout:
        largest = [max(sides) for sides in zip(*(image.size for row in rows for image in row.images), strict=True)]
        columns = max(len(row.images) for row in rows)
        most = max(1, min(LARGEST_CELL, (SHEET_WIDTH - MARGIN) // columns - MARGIN))
        enlarged = max(1, min(-(-CELL // max(largest)), most // max(largest)))  # whole, so that pixels stay pixels
        factor = min(enlarged, most / max(largest))
        cell = (max(1, round(largest[0] * factor)), max(1, round(largest[1] * factor)))
        width = MARGIN + columns * (cell[0] + MARGIN)
        return cls(cell, factor, width, text_lines(title, width - 2 * MARGIN) if title else [])

    def label(self, row: Row) -> list[tuple[str, Any]]:
        return text_lines(row.label, self.width - 2 * MARGIN)

    def height(self, row: Row) -> int:
        return LINE * len(self.label(row)) + self.cell[1] + LINE + MARGIN

    def head_height(self) -> int:
        return MARGIN + LINE * len(self.heading)

    def parts(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """The rows of each sheet."""
        part: list[Row] = []
        height = self.head_height()
        for row in rows:
            if part and (height + self.height(row)) * self.width > SHEET_PIXELS:
                yield part
                part, height = [], self.head_height()
            part.append(row)
            height += self.height(row)
        yield part


def _draw_sheet(rows: Sequence[Row], layout: _Layout) -> Image.Image:
    cell_width, cell_height = layout.cell
    sheet = Image.new("RGB", (layout.width, layout.head_height() + sum(map(layout.height, rows))), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for text, font in layout.heading:
        draw.text((MARGIN, top), text, fill=FAINT, font=font)
        top += LINE
    for row in rows:
        for text, font in layout.label(row):
            draw.text((MARGIN, top), text, fill=INK, font=font)
            top += LINE
        for column, (image, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            x = MARGIN + column * (cell_width + MARGIN)
            width, height = (max(1, round(side * layout.factor)) for side in image.size)
            kind = Image.Resampling.NEAREST if layout.factor >= 1 else Image.Resampling.LANCZOS
            sheet.paste(image.resize((width, height), kind), (x, top))
            text, font = text_lines(caption, cell_width)[0]
            draw.text((x, top + cell_height + 2), text, fill=FAINT, font=font)
        top += cell_height + LINE + MARGIN
    return sheet
