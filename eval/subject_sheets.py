"""One sheet of pictures for each subject of a comparison: a row for each method, a column for each prompt, at seed 0.

Its EXIF data say which picture is where, so that `eval.report` can cut them out again.
Photos are on it only of subjects that come with this repository, so a sheet can be passed on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from eval.cells import Cell
from eval.results import cell_folder, pictures_folder, row_id
from eval.subjects import Subject
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import whole_file
from gsoft_diffusion.photos.image_files import open_image, opened, upright
from gsoft_diffusion.sampling.contact_sheets import FAINT, INK, MARGIN, PAPER, SHEET_PIXELS
from gsoft_diffusion.sampling.lettering import LINE, text_lines

DESCRIPTION = 0x010E  # EXIF's ImageDescription, which holds the places as JSON
LARGEST, QUALITY = 256, 95  # pixels of a picture's longer side; of WebP
LONGEST = 15_000  # pixels of a side for pictures; WebP ends at 16,383 with headings
LABELS = 150  # pixels for the labels left of the pictures

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class SheetRow:
    """The pictures of one cell by their file names, and what the row is called."""

    label: str
    pictures: Mapping[str, Image.Image]


@dataclass(frozen=True)
class SubjectSheet:
    """What is on a sheet.

    columns: the prompt of each picture's file name. rows: by `row_id` of their results.
    """

    photos: Sequence[Image.Image] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, SheetRow] = field(default_factory=dict)

    def has_all_of(self, other: SubjectSheet) -> bool:
        """Whether this sheet has every row, picture and photo of the other."""
        rows = self.rows.keys() >= other.rows.keys()
        return (
            rows
            and len(self.photos) >= len(other.photos)
            and self.columns == other.columns
            and all(self.rows[name].pictures.keys() >= row.pictures.keys() for name, row in other.rows.items())
        )


def sheet_path(subject: str, out: Path) -> Path:
    """Where the sheet of a subject is.

    subject: its name. out: the comparison's folder.
    """
    return out / "sheets" / f"{subject}.webp"


def write_subject_sheet(subject: Subject, cells: Iterable[tuple[str, Mapping[str, Any]]], out: Path) -> None:
    """Add cells to the subject's sheet, which keeps the rows that it has.

    subject: whose sheet; its photos are shown only if they are bundled. cells: for each row its label and the cell's
    result, the base model's first. out: the comparison's folder. A picture whose cell has no folder any more stays
    blank, unless the sheet has it. Raises UserError for a damaged picture.
    """
    path = sheet_path(subject.name, out)
    before = read_subject_sheet(path) if path.exists() else SubjectSheet()
    cells = list(cells)
    columns = {
        picture["file"]: picture["prompt"]
        for picture in cells[0][1]["pictures"]
        if picture["seed"] == 0 and picture["kind"] in ("context", "base")
    }
    rows = {}
    for label, result in cells:
        name = row_id(result)
        kept = before.rows[name].pictures if name in before.rows else {}
        folder = pictures_folder(result, out)
        missing = [file for file in columns if file not in kept] if "pictures" in result and folder.is_dir() else []
        rows[name] = SheetRow(label, {**kept, **{file: _picture(folder / file, result, out) for file in missing}})
    photos = [open_image(photo) for photo in subject.photos()] if subject.is_bundled else []
    sheet = SubjectSheet(photos, columns, rows | {name: row for name, row in before.rows.items() if name not in rows})
    if path.exists() and before.has_all_of(sheet):
        return
    image, places = _drawn(subject.name, sheet)
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(places)  # plain ASCII
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as file:
        image.save(file, "WEBP", quality=QUALITY, method=6, exif=exif)


def read_subject_sheet(path: Path) -> SubjectSheet:
    """The pictures on a sheet. Raises UserError for a file that is not one."""
    if not path.exists():
        raise UserError(f"{path}: is not there; run eval.benchmark again to draw it")
    with opened(path) as image:
        pixels = upright(path, image)[0].convert("RGB")
        description = image.getexif().get(DESCRIPTION, "")
    try:
        places = json.loads(description)
        return SubjectSheet(
            [_cut(pixels, box) for box in places["photos"]],
            {str(file): str(prompt) for file, prompt in places["columns"].items()},
            {
                name: SheetRow(row["label"], {file: _cut(pixels, box) for file, box in row["places"].items()})
                for name, row in places["rows"].items()
            },
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: does not say which pictures are where; put back the sheet that eval.benchmark wrote, or delete "
            "this one and run eval.benchmark again"
        ) from error


def _picture(path: Path, result: Mapping[str, Any], out: Path) -> Image.Image:
    try:
        return open_image(path)
    except UserError as error:
        cell = cell_folder(Cell(**result["cell"]), out)
        raise UserError(f"{error}. It is a cell's: delete {cell} and run eval.benchmark again") from error


def _cut(sheet: Image.Image, box: Sequence[int]) -> Image.Image:
    left, top, right, bottom = map(int, box)
    if not (0 <= left < right <= sheet.width and 0 <= top < bottom <= sheet.height):
        raise ValueError(f"{box} is not on the sheet")
    return sheet.crop((left, top, right, bottom))


def _drawn(subject: str, sheet: SubjectSheet) -> tuple[Image.Image, dict[str, Any]]:
    """The sheet as a picture, and the places of the pictures on it."""
    pictures = [picture for row in sheet.rows.values() for picture in row.pictures.values()]
    across, down = max(len(sheet.columns), len(sheet.photos)), len(sheet.rows) + bool(sheet.photos)
    side = min(
        max((max(picture.size) for picture in (*pictures, *sheet.photos)), default=LARGEST),
        LARGEST,
        LONGEST // max(across, down) - MARGIN,
        math.isqrt(SHEET_PIXELS // (across * down)) - MARGIN,
    )
    width = MARGIN + LABELS + across * (side + MARGIN)
    heading = text_lines(f"{subject}: a row for each method, a column for each prompt, seed 0", width - 2 * MARGIN)
    legend = [
        line
        for number, prompt in enumerate(sheet.columns.values(), start=1)
        for line in text_lines(f"{number}  {prompt}", width - 2 * MARGIN)
    ]
    row_height = max(side, 3 * LINE) + MARGIN  # labels have three lines at most
    height = 2 * MARGIN + LINE * (len(heading) + 1) + down * row_height + LINE * len(legend) + MARGIN
    paper = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(paper)

    def write(left: int, top: int, lines: Sequence[tuple[str, Any]], ink: str) -> None:
        for number, (text, font) in enumerate(lines):
            draw.text((left, top + LINE * number), text, fill=ink, font=font)

    def left_of(column: int) -> int:
        return MARGIN + LABELS + column * (side + MARGIN)

    def paste(picture: Image.Image, column: int, top: int) -> Box:
        shown = picture.copy()
        shown.thumbnail((side, side), Image.Resampling.LANCZOS)
        paper.paste(shown, (left_of(column), top))
        return left_of(column), top, left_of(column) + shown.width, top + shown.height

    write(MARGIN, MARGIN, heading, INK)
    top = 2 * MARGIN + LINE * len(heading)
    photos: list[Box] = []
    if sheet.photos:
        write(MARGIN, top, text_lines("photos", LABELS - MARGIN), INK)
        photos = [paste(photo, column, top) for column, photo in enumerate(sheet.photos)]
        top += row_height
    for column in range(len(sheet.columns)):
        write(left_of(column), top, text_lines(str(column + 1), side), FAINT)
    top += LINE
    rows = {}
    for name, row in sheet.rows.items():
        write(MARGIN, top, text_lines(row.label, LABELS - MARGIN), INK)
        places = {
            file: paste(row.pictures[file], column, top)
            for column, file in enumerate(sheet.columns)
            if file in row.pictures
        }
        rows[name] = {"label": row.label, "places": places}
        top += row_height
    write(MARGIN, top, legend, FAINT)
    return paper, {"photos": photos, "columns": dict(sheet.columns), "rows": rows}
