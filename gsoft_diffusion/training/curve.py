"""Scores and validation loss of a run's steps beside its sheets: `validation/curve.csv`, and drawn, `curve.png`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from gsoft.whole_file import whole_file
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import CURVE, CURVE_TABLE, scored_steps
from gsoft_diffusion.training.progress import read_progress
from gsoft_diffusion.training.validation_scores import read_scores

TITLES = {
    "dino": "likeness to the photos (DINO)",
    "clip_t": "truth to the prompts (CLIP-T)",
    "balance": "balance",
    "validation_loss": "validation loss",
}


@dataclass(frozen=True)
class Point:
    """What is known of a step; names as in `StepScores` and `StepNumbers`."""

    step: int
    dino: float | None = None
    clip_t: float | None = None
    balance: float | None = None
    validation_loss: float | None = None


def write_curve(folder: Path, step: int, best: int | None) -> None:
    """Write table and picture of all steps up to this one that were scored or measured; the base model's is step 0.

    folder: the run's. step: optimizer steps done. best: the step that is kept, None if none is.

    Raises UserError if they cannot be written.
    """
    points = _points(folder, step)
    if not points:
        return
    try:
        (folder / CURVE).parent.mkdir(exist_ok=True)
        with whole_file(folder / CURVE_TABLE) as file:
            file.write(_table(points).encode())
        with whole_file(folder / CURVE) as file:
            file.write(_picture(points, best))
    except OSError as error:
        raise UserError(f"cannot write {folder / CURVE}: {error.strerror}; checkpoints are intact") from error


def _points(folder: Path, last: int) -> list[Point]:
    losses = {each.step: each.validation_loss for each in read_progress(folder) if each.validation_loss is not None}
    scores = {step: found for step in scored_steps(folder) if (found := read_scores(folder, step))}
    points = []
    for step in sorted({*losses, *scores}):
        if step <= last:
            known = asdict(scores[step]) if step in scores else {"step": step}
            points.append(Point(**known, validation_loss=losses.get(step)))
    return points


def _table(points: Sequence[Point]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Point))
    writer.writerows(map(astuple, points))
    return text.getvalue()


def _picture(points: Sequence[Point], best: int | None) -> bytes:
    from matplotlib.figure import Figure  # takes a while, and most runs draw none

    values = {name: [(p.step, value) for p in points if (value := getattr(p, name)) is not None] for name in TITLES}
    known = {name: found for name, found in values.items() if found}
    figure = Figure(figsize=(3 * len(known), 3), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(known), squeeze=False)[0], known.items(), strict=True):
        axes.plot([step for step, _ in found], [value for _, value in found], "o-", color="#1d6fb8", markersize=3)
        if best is not None:
            axes.axvline(best, color="#c1121f", linewidth=0.8, label=f"kept: step {best}")
            axes.legend(fontsize=7)
        axes.set_title(TITLES[name], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
