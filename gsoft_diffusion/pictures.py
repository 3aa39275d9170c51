"""Pictures on disk: safe names, settings inside the PNG, labelled contact sheets. Never writes over a file."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from gsoft_diffusion.errors import UserError

METADATA_KEY = "gsoft_diffusion"  # the PNG text field that holds the settings, as JSON
ROWS_A_SHEET = 25
CELL = 192  # least that a picture's longer side has on a sheet, so that labels can be read
MARGIN, FONT_SIZE = 8, 14
PAPER, INK, FAINT = "white", "black", "dimgray"


def slug(text: str, length: int = 60) -> str:
    """`text` as ASCII letters, digits and single dashes, at most `length` of them: safe in any file's name."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")[:length].strip("-") or "picture"


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a new PNG with `metadata` inside. UserError if the file exists or cannot be written."""
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))  # plain ASCII
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            image.save(file, "PNG", pnginfo=info)
    except FileExistsError as error:
        raise UserError(f"{path} exists: choose another output folder") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def next_number(folder: Path) -> int:
    """One more than the largest number of a picture or a contact sheet in the folder, 0 if there is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = [int(found[1]) for name in names if (found := re.match(r"(?:contact_sheet_)?(\d{4,})[_.]", name))]
    return max(numbers, default=-1) + 1


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet: a label above, pictures in line, a caption under each."""

    label: str
    images: Sequence[Image.Image]
    captions: Sequence[str]


def contact_sheet(rows: Sequence[Row], title: str = "") -> Image.Image:
    """The rows on white paper. Small pictures are enlarged to at least 192 pixels."""
    font = ImageFont.load_default(FONT_SIZE)
    largest = [max(sides) for sides in zip(*(image.size for row in rows for image in row.images), strict=True)]
    factor = max(1, -(-CELL // max(largest)))  # whole, so that pixels stay pixels
    cell_width, cell_height = (side * factor for side in largest)
    columns = max(len(row.images) for row in rows)
    width = MARGIN + columns * (cell_width + MARGIN)
    line = FONT_SIZE + 6
    labels = [_wrapped(row.label, font, width - 2 * MARGIN) for row in rows]
    heading = _wrapped(title, font, width - 2 * MARGIN) if title else []
    heights = [line * len(label) + cell_height + line + MARGIN for label in labels]
    sheet = Image.new("RGB", (width, MARGIN + line * len(heading) + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for text in heading:
        draw.text((MARGIN, top), text, fill=FAINT, font=font)
        top += line
    for row, label, height in zip(rows, labels, heights, strict=True):
        for number, text in enumerate(label):
            draw.text((MARGIN, top + number * line), text, fill=INK, font=font)
        y = top + line * len(label)
        for column, (image, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            x = MARGIN + column * (cell_width + MARGIN)
            size = (image.width * factor, image.height * factor)
            sheet.paste(image.resize(size, Image.Resampling.NEAREST), (x, y))
            draw.text((x, y + cell_height + 2), _wrapped(caption, font, cell_width)[0], fill=FAINT, font=font)
        top += height
    return sheet


def contact_sheets(rows: Sequence[Row], title: str = "") -> list[Image.Image]:
    """As many sheets as it takes to keep each within what viewers open."""
    return [contact_sheet(rows[start : start + ROWS_A_SHEET], title) for start in range(0, len(rows), ROWS_A_SHEET)]


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """`text` in at most three lines that fit the width; the rest is cut with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > 3:
        lines = [*lines[:2], lines[2] + "…"]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
