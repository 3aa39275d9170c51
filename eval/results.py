"""What a comparison's folder holds, and the file that keeps all that was measured.

experiment.yaml          settings
results.jsonl            one line a cell: settings, versions, times, the score of every picture
sheets/<subject>.webp    the pictures, see eval/subject_sheets.py
report.html and others   what `eval.report` makes of these three
work/                    what only a comparison in progress needs: cells with all their pictures, class images, logs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.cells import Cell
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import whole_file
from gsoft_diffusion.foundation.text_files import read_text

SETTINGS, RESULTS, PAGE_NAME = "experiment.yaml", "results.jsonl", "report.html"
CELL_RESULT = "result.json"  # in a cell's folder

Results = dict[Cell, dict[str, Any]]
DECIMALS = 6  # of a picture's scores before the end of training


def work_folder(out: Path) -> Path:
    """Where a comparison in progress keeps what its results do not need."""
    return out / "work"


def cell_folder(cell: Cell, out: Path) -> Path:
    """Where a finished cell is, with all its pictures: whole or not at all.

    cell: which one. out: the comparison's folder.
    """
    return work_folder(out) / "cells" / cell.id


def recorded_steps(result: Mapping[str, Any]) -> list[int]:
    """After how many steps a cell was scored, by its curve; nothing if it has none."""
    return [point["step"] for point in result.get("curve", [])]


def result_at(result: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A cell's result as it was after so many steps: `scores`, and `pictures` where their scores were kept.

    result: with a curve. step: one of its `recorded_steps`. Before the last of them, `stopped_at` is the step, the
    seconds of training are its share of the whole, and what was measured of the last adapter alone is left out.
    """
    if step == recorded_steps(result)[-1]:
        return dict(result)
    point = next(point for point in result["curve"] if point["step"] == step)
    scores = {name: value for name, value in point.items() if name not in ("step", "pictures")}
    found = {name: value for name, value in result.items() if name not in ("pictures", "orthogonality_error")}
    found["scores"] = scores
    if "train_seconds" in found:
        found["train_seconds"] *= step / recorded_steps(result)[-1]
    if columns := point.get("pictures"):
        found["pictures"] = [
            picture | {name: values[number] for name, values in columns.items()}
            for number, picture in enumerate(result["pictures"])
        ]
    return found | {"stopped_at": step}


def as_columns(pictures: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The scores of pictures, by name one list in their order: short, for a curve has many."""
    return {
        name: [round(picture[name], DECIMALS) for picture in pictures]
        for name, value in pictures[0].items()
        if isinstance(value, float)
    }


def row_id(result: Mapping[str, Any]) -> str:
    """Names a row of pictures on a sheet: the cell, and the step if that is before the end."""
    step = result.get("stopped_at")
    return Cell(**result["cell"]).id + (f"--step{step}" if step else "")


def pictures_folder(result: Mapping[str, Any], out: Path) -> Path:
    """Where the pictures of a result are.

    result: of a cell, or of a step of it. out: the comparison's folder.
    """
    folder = cell_folder(Cell(**result["cell"]), out)
    return step_folder(folder, result["stopped_at"]) if "stopped_at" in result else folder


def step_folder(cell: Path, step: int) -> Path:
    """Where a cell's pictures of a step before the end are.

    cell: its folder. step: their step.
    """
    return cell / f"step{step}"


def read_results(out: Path) -> Results:
    """All that the comparison's `results.jsonl` says, in order of the cells' names; nothing without that file.

    Raises UserError naming the line that is no cell's result.
    """
    path = out / RESULTS
    results: Results = {}
    lines = read_text(path).split("\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            result = json.loads(line)
            results[Cell(**result["cell"])] = result
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}: is not the result of a cell ({error}); put back an undamaged copy, or delete "
                "the line and run eval.benchmark again"
            ) from error
    return results


def all_results(out: Path) -> Results:
    """Those of `results.jsonl`, and of cells that finished since it was written. Raises UserError as `read_results`."""
    if (out / "cells").is_dir():
        raise UserError(
            f"{out / 'cells'}: an earlier version put its cells there; move them to {work_folder(out) / 'cells'}, "
            "so that they are not run again"
        )
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((work_folder(out) / "cells").glob(f"*/{CELL_RESULT}"))
    ]
    return {Cell(**result["cell"]): result for result in found} | read_results(out)


def collect_results(out: Path) -> Results:
    """Write all finished cells into `results.jsonl`, which loses none that it has; returns them.

    Raises UserError as `all_results`.
    """
    results = all_results(out)
    if results != read_results(out):
        lines = [
            json.dumps(results[cell], ensure_ascii=False, separators=(",", ":"))
            for cell in sorted(results, key=lambda cell: cell.id)
        ]
        with whole_file(out / RESULTS) as file:
            file.write(("\n".join(lines) + "\n").encode())
    return results


def is_done(cell: Cell, out: Path) -> bool:
    """Whether a cell need not run: its folder is there, or `results.jsonl` has it.

    cell: which one. out: the comparison's folder. Raises UserError as `read_results`.
    """
    return (cell_folder(cell, out) / CELL_RESULT).is_file() or cell in read_results(out)
