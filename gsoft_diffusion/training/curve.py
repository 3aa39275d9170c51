"""The scores of a run's steps beside its sheets: a table, `validation/curve.csv`, and drawn, `validation/curve.png`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

from gsoft.whole_file import whole_file
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import CURVE, CURVE_TABLE, scored_steps
from gsoft_diffusion.training.validation_scores import StepScores, read_scores

TITLES = {"dino": "likeness to the photos (DINO)", "clip_t": "truth to the prompts (CLIP-T)", "balance": "balance"}


def write_curve(folder: Path, step: int, best: int | None) -> None:
    """Write table and picture of all scored steps up to this one; the base model's is step 0.

    folder: the run's. step: optimizer steps done. best: the step that is kept, None if none is.

    Raises UserError if they cannot be written.
    """
    found = (read_scores(folder, each) for each in scored_steps(folder) if each <= step)
    scores = [each for each in found if each]
    try:
        with whole_file(folder / CURVE_TABLE) as file:
            file.write(_table(scores).encode())
        with whole_file(folder / CURVE) as file:
            file.write(_picture(scores, best))
    except OSError as error:
        raise UserError(f"cannot write {folder / CURVE}: {error.strerror}; checkpoints are intact") from error


def _table(scores: Sequence[StepScores]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(StepScores))
    writer.writerows(astuple(each) for each in scores)
    return text.getvalue()


def _picture(scores: Sequence[StepScores], best: int | None) -> bytes:
    from matplotlib.figure import Figure  # takes a while, and most runs draw none

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        known = [(each.step, value) for each in scores if (value := getattr(each, name)) is not None]
        axes.plot([step for step, _ in known], [value for _, value in known], "o-", color="#1d6fb8", markersize=3)
        if best is not None:
            axes.axvline(best, color="#c1121f", linewidth=0.8, label=f"kept: step {best}")
            axes.legend(fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
