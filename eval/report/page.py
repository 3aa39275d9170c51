"""The report as one HTML page, with the pictures of the subjects' sheets."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from eval.experiment import Experiment
from eval.report.lines import Line
from eval.results import row_id
from eval.subject_sheets import SubjectSheet, read_subject_sheet, sheet_path

PICTURES = "Pictures"  # the section that the page fills itself
LARGEST, QUALITY = 192, 85  # pixels of a picture's longer side, twice what the page shows it with; of WebP


@dataclass(frozen=True)
class Report:
    """What a report consists of.

    lines: of the table, a column of pictures each. sections: Markdown by heading, in order; `PICTURES` has none, and
    comes only if there are sheets. plots: SVG by heading and name. tables: CSV by file name.
    """

    lines: Sequence[Line]
    sections: Mapping[str, str]
    plots: Mapping[str, Mapping[str, str]]
    tables: Mapping[str, str]


def page(experiment: Experiment, out: Path, report: Report) -> str:
    """One HTML page that needs no other file: pictures side by side under the same prompt and seed, tables, plots.

    experiment: the settings. out: the comparison's folder, for the subjects' sheets. report: what is shown. Raises
    UserError for a sheet that is missing or damaged.
    """
    parts = []
    for title, text in report.sections.items():
        parts.append((f"<h2>{html.escape(title)}</h2>" if title else "") + _html(text))
        for svg in report.plots.get(title, {}).values():
            parts.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
        if title == PICTURES:
            parts.append(_pictures(experiment, out, report.lines))
    return PAGE.replace("{body}", "\n".join(parts))


def _html(text: str) -> str:
    """The little Markdown that the sections use."""
    blocks = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
            cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            blocks.append("<div class=wide><table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>")
        elif block.startswith("# "):
            blocks.append(f"<h1>{html.escape(block[2:])}</h1>")
        elif block.startswith("**"):
            blocks.append(f"<p class=note>{html.escape(block.strip('*'))}</p>")
        elif block:
            blocks.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(blocks)


def _pictures(experiment: Experiment, out: Path, lines: Sequence[Line]) -> str:
    """For each subject at seed 0 one table: a row for each prompt, a column for each method."""
    columns = [line for line in lines if line.results]
    blocks: list[str] = []
    for subject in experiment.subject_names():
        sheet = read_subject_sheet(sheet_path(subject, out))
        results = [line.result_of(subject) for line in columns]
        titles = [html.escape(line.label_of(subject)) for line in columns]
        heads = "<tr><th>prompt</th>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
        photos = "".join(_image(photo, "a photo") for photo in sheet.photos)
        rows = [heads]
        for file, prompt in sheet.columns.items():
            label = f"{html.escape(prompt)}<br><small>seed 0</small>"
            images = [_cell_image(sheet, result, file) for result in results]
            rows.append(f"<tr><td>{label}</td>" + "".join(f"<td>{image}</td>" for image in images) + "</tr>")
        blocks.append(
            f"<details{' open' if not blocks else ''}><summary>{html.escape(subject)}</summary>"
            f"<p class=photos>{photos}</p><div class=wide><table class=pictures>{''.join(rows)}</table></div></details>"
        )
    return "\n".join(blocks)


def _cell_image(sheet: SubjectSheet, result: Mapping[str, Any], file: str) -> str:
    scored = [picture for picture in result.get("pictures", []) if picture["file"] == file]
    if not scored:
        return "diverged"
    row = sheet.rows.get(row_id(result))
    if row is None or file not in row.pictures:
        return "not kept"
    return _image(row.pictures[file], f"DINO {scored[0]['dino']:.2f}, CLIP-T {scored[0]['clip_t']:.2f}")


def _image(picture: Image.Image, caption: str) -> str:
    """The picture inside the page, large ones reduced."""
    picture = picture.copy()
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY, method=6)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" title="{html.escape(caption)}" alt="{html.escape(caption)}">'


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of fine-tuning methods</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 }
.note { background: #fff3cd; border-left: 4px solid #e0a800; padding: .6rem 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #888 }
.pictures td, .pictures th { padding: .2rem; vertical-align: top }
.pictures th { white-space: normal; max-width: 100px }
.pictures td:first-child { white-space: normal; min-width: 9rem }
img { width: 96px; height: 96px; object-fit: cover; image-rendering: auto; border-radius: 3px }
.photos img { margin-right: 4px }
figure { margin: 1rem 0 }
svg { max-width: 100%; height: auto }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; padding: .4rem 0 }
</style>
{body}
</html>
"""
