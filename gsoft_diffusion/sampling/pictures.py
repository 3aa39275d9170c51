"""Pictures on disk: safe names, settings inside the PNG, labelled contact sheets. Never writes over a file."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import METADATA_KEY
from gsoft_diffusion.photos.image_files import open_image, opened

logger = logging.getLogger(__name__)

SHEET_PIXELS = 40_000_000  # of a sheet; Pillow warns of pictures above 89 million and refuses twice as many
# Pixels of a picture's longer side on a sheet: labels can be read from the first on, and the second is large enough.
CELL, LARGEST_CELL = 192, 1024
SHEET_WIDTH = 8300  # pixels: eight of the largest cells; more in a row are made smaller
MARGIN, FONT_SIZE = 8, 14
LINE = FONT_SIZE + 6
PAPER, INK, FAINT = "white", "black", "dimgray"


def slug(text: str, length: int = 60, default: str = "picture") -> str:
    """`text` as ASCII letters, digits and single dashes, at most `length` of them: safe in any file's name.

    default: for a text of which nothing is left.
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")[:length].strip("-") or default


def save_png(image: Image.Image, folder: Path, name: str, number: int, metadata: Mapping[str, Any]) -> Path:
    """Write a new PNG with its settings inside; returns its path.

    image: the picture.
    folder: where it goes; made if it is not there.
    name: of the file, with `{}` for the number.
    number: counted up where another command was faster with that name.
    metadata: what to keep in the PNG, as JSON.

    Raises UserError if it cannot be written; nothing of it stays then.
    """
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))  # plain ASCII
    while True:
        path = folder / name.format(f"{number:04d}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_new(image, path, info)
            return path
        except OSError as error:
            if not (isinstance(error, FileExistsError) and folder.is_dir()):
                raise UserError(f"cannot write {path}: {error.strerror}") from error
            number += 1


def _write_new(image: Image.Image, path: Path, info: PngInfo) -> None:
    """Write a PNG where there is no file, completely or not at all. Raises OSError."""
    file = path.open("xb")
    try:
        with file:
            image.save(file, "PNG", pnginfo=info)
    except BaseException:
        path.unlink()
        raise


def read_facts(path: Path) -> dict[str, Any]:
    """What `save_png` kept in a PNG: prompt, seed, sampler and more; nothing if it holds no such text.

    Whoever made the file may have written anything, so values are to be checked before they are used.
    """
    try:
        with opened(path) as image:
            facts = json.loads(image.info.get(METADATA_KEY, "{}"))
    except (UserError, ValueError, TypeError, RecursionError):  # no picture, no JSON, or not even a text
        return {}
    return facts if isinstance(facts, dict) else {}


def next_number(folder: Path) -> int:
    """One more than the largest number of a picture or a contact sheet in the folder, 0 if there is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = [int(found[1]) for name in names if (found := re.match(r"(?:contact_sheet_)?(\d{4,})[_.]", name))]
    return max(numbers, default=-1) + 1


@dataclass(frozen=True)
class PictureFile:
    """A picture of known size in a file, which is read where it is asked for, as many do not fit into memory."""

    path: Path
    size: tuple[int, int]

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """The picture in another size, as Pillow makes it. Raises UserError if the file cannot be read."""
        return open_image(self.path).resize(size, resample)


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet: a label above, pictures in line, a caption under each."""

    label: str
    images: Sequence[Image.Image | PictureFile]
    captions: Sequence[str]


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


# Text on them


def text_lines(text: str, width: int) -> list[tuple[str, Any]]:
    """`text` in at most three lines, each with the font to draw it in; the rest is cut with an ellipsis.

    width: pixels that a line may take.
    """
    font = _font(_font_for(text))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > 3:
        lines = [*lines[:2], lines[2] + "…"]
    return [(_cut(line, font, width), font) for line in lines]


def _cut(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


@cache
def _font_for(text: str) -> str | None:
    """The file of a font that has the text's characters: None for Pillow's own, or the first of this machine's.

    If none has all, the one that lacks fewest, which is said: boxes will stand for the rest.
    """
    if text.isascii():
        return None
    wanted = {ord(character) for character in text if character.isprintable() and not character.isspace()}
    font: str | None = None
    missing = wanted - _characters(font)
    for path in _system_fonts() if missing else ():
        lacks = wanted - _characters(path)
        if len(lacks) < len(missing):
            missing, font = lacks, path
        if not missing:
            break
    if missing:
        shown = "".join(map(chr, sorted(missing)[:10]))
        logger.warning(
            "no font on this machine has %s: contact sheets show boxes instead; install one, such as Noto Sans", shown
        )
    return font


@cache
def _font(path: str | None) -> Any:
    return ImageFont.truetype(path, FONT_SIZE) if path else ImageFont.load_default(FONT_SIZE)


@cache
def _system_fonts() -> list[str]:
    """Upright sans-serif fonts first; matplotlib brings DejaVu Sans, which has Greek, Cyrillic, Hebrew and Arabic."""
    from matplotlib import font_manager  # takes a while, and Latin letters need none of it

    def rank(font: font_manager.FontEntry) -> tuple[bool, bool, bool, str]:
        return "Sans" not in font.name, font.style != "normal", font.weight not in (400, "normal"), font.fname

    fonts = [
        font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name
    ]  # it has boxes for all
    return [font.fname for font in sorted(fonts, key=rank)]


@cache
def _characters(path: str | None) -> frozenset[int]:
    """The code points that a font has, Pillow's own if no path is given; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path or BytesIO(_font(None).font_bytes)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
