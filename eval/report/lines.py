"""From results to lines: what a method at a size scored, over all subjects and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.cells import Cell, base_cells, budgets_of, main_cells, sweep_cells
from eval.experiment import Experiment
from eval.methods import TITLES
from eval.report.intervals import Array, Interval, estimate, resampled_weights, weighted
from eval.results import RESULTS, Results, recorded_steps, result_at
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.scoring import metrics

SCORES = {  # what tables show, with the direction that is better
    "clip_i_base_prompt": "CLIP-I, base prompt ↑",
    "clip_i": "CLIP-I ↑",
    "dino": "DINO ↑",
    "clip_t": "CLIP-T ↑",
    "balance": "balance ↑",
    "dino_nearest": "nearest photo",
    "pres": "PRES ↓",
    "div": "DIV ↑",
    "drift": "drift ↓",
}
COMPARED = ("dino", "clip_i", "clip_t", "balance")
OURS = "double_gsoft"


@dataclass(frozen=True)
class Line:
    """One line of the table: a method at a size, over all subjects and seeds.

    scores: for each name of `SCORES`, by subject, one value a seed. resampled: the mean of a score in each resample,
    for a line whose settings were chosen by scores, so that resamples choose anew (`eval/report/held_out.py`); a score
    without an entry is resampled as it is.
    """

    method: str
    budget: str | None
    learning_rate: float | None
    results: list[dict[str, Any]]
    scores: dict[str, dict[str, list[float]]]
    resampled: dict[str, Array] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tables call its method."""
        named = {"base": "Base model", "photos": "Real photos"}
        return named.get(self.method) or TITLES[self.method]

    @property
    def title(self) -> str:
        """Its name with what tells it from others of the same method."""
        return f"{self.name} {self.budget or ''}".strip()

    def label_of(self, subject: str) -> str:
        """Its title with the learning rate of a subject, where there is one, and the step if that is before the end."""
        result = self.result_of(subject)
        rate, step = result["cell"]["learning_rate"], result.get("stopped_at")
        return self.title + (f", {rate:g}" if rate else "") + (f", step {step}" if step else "")

    @property
    def size(self) -> str:
        """The method's size in a few words, as `describe` gives it; empty for base model and photos."""
        return self.results[0].get("size", "") if self.results else ""

    def result_of(self, subject: str) -> dict[str, Any]:
        """The result of a subject at seed 0."""
        return next(r for r in self.results if (r["cell"]["subject"], r["cell"]["seed"]) == (subject, 0))

    def mean(self, fact: str) -> float | None:
        """The mean of a number that results have, such as `train_seconds`, over all of them; None if none has it."""
        values = [result[fact] for result in self.results if result.get(fact) is not None]
        return metrics.mean(values) if values else None

    def interval(self, score: str) -> Interval | None:
        """Mean and interval of a score, one of `SCORES`; None where the line has no such score."""
        return _interval(self, score) if self.scores.get(score) else None

    def values(self, score: str) -> Array:
        """A score that the line has, `(subjects, seeds)`."""
        return np.array(list(self.scores[score].values()), dtype=np.float64)

    def draws(self, score: str) -> Array:
        """The mean of a score that the line has in each resample, the same for all lines of these subjects."""
        if score in self.resampled:
            return self.resampled[score]
        values = self.values(score)[:, :, None]
        return weighted(values, resampled_weights(values.shape))


def _interval(line: Line, score: str, minus: Line | None = None) -> Interval:
    """The mean over subjects, each averaged over its seeds first, with its interval; or that of a paired difference.

    line: has the score. minus: another line with the score of the same subjects and seeds.
    """
    values, draws = line.values(score), line.draws(score)
    if minus:
        values, draws = values - minus.values(score), draws - minus.draws(score)
    return estimate(float(values.mean()), draws, *values.shape).interval


References = dict[tuple[str, int], tuple[tuple[float, float], tuple[float, float]]]


def references(results: Iterable[Mapping[str, Any]]) -> References:
    """For each subject and seed what balance is measured between: (DINO, CLIP-T) of base model and photos."""
    return {
        (result["cell"]["subject"], result["cell"]["seed"]): (
            (result["scores"]["dino"], result["scores"]["clip_t"]),
            (result["photos"]["dino"], result["photos"]["clip_t"]),
        )
        for result in results
        if result["cell"]["method"] == "base"
    }


def line_of(
    method: str, budget: str | None, rate: float | None, results: list[dict[str, Any]], ends: References
) -> Line:
    """The line that some results make.

    method, budget, rate: what they share. results: one for each subject and seed; if any of them diverged, the line has
    no scores. ends: what balance is measured between, see `references`; subjects that are not among them have none.
    """
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in SCORES}
    whole = results if all("scores" in result for result in results) else []  # one that diverged spoils its line
    for result in sorted(whole, key=lambda result: result["cell"]["seed"]):
        for name, value in scores_of(result, ends).items():
            scores[name].setdefault(result["cell"]["subject"], []).append(value)
    return Line(method, budget, rate, results, scores)


def scores_of(result: Mapping[str, Any], ends: References) -> dict[str, float]:
    """Those of `SCORES` that a result has; none if it diverged.

    ends: what balance is measured between, see `references`; the base model has none, nor a subject without ends.
    """
    cell, found = result["cell"], dict(result.get("scores", {}))
    if found and cell["method"] != "base" and (cell["subject"], cell["seed"]) in ends:
        found["balance"] = metrics.balance(found["dino"], found["clip_t"], *ends[cell["subject"], cell["seed"]])
    return {name: found[name] for name in SCORES if name in found}


def photos_line(base: Sequence[Mapping[str, Any]]) -> Line:
    """The line of the real photos, which have one score a subject.

    base: the results of the base model, which have the photos' scores.
    """
    scores: dict[str, dict[str, list[float]]] = {
        name: {result["cell"]["subject"]: [result["photos"][name]] for result in base}
        for name in ("clip_i", "dino", "clip_t", "dino_nearest")
        if all(name in result["photos"] for result in base)  # results of before have no nearest photo
    }
    return Line("photos", None, None, [], scores)


def check_complete(cells: Iterable[Cell], results: Results) -> None:
    """Raise UserError naming the cells that have no result."""
    if missing := [cell.id for cell in cells if cell not in results]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{RESULTS} lacks {missing[0]}{more}; run eval.benchmark again to complete it")


def sweep_lines(experiment: Experiment, results: Results) -> dict[str, dict[float, Line]]:
    """By method and learning rate, the cells of the sweep. A rate at which any of them diverged has no scores.

    experiment: says which cells those are. results: of these and of the base model. Raises UserError if cells are
    missing.
    """
    cells = sweep_cells(experiment)
    check_complete([*base_cells(experiment), *cells], results)
    ends = references(results.values())
    lines: dict[str, dict[float, Line]] = {method: {} for method in experiment.methods}
    for method, budget, rate in dict.fromkeys(cell.row for cell in cells):
        found = [results[cell] for cell in cells if cell.row == (method, budget, rate)]
        lines[method][rate or 0] = line_of(method, budget, rate, found, ends)
    return lines


def table_lines(experiment: Experiment, results: Results, rates: Mapping[str, float]) -> list[Line]:
    """The lines of the table: real photos, base model, then every budget's methods at its learning rate.

    experiment: the settings. results: of all cells. rates: the learning rate that was chosen for each method. Raises
    UserError if cells are missing.
    """
    cells = [*base_cells(experiment), *main_cells(experiment, rates)]
    check_complete(cells, results)
    ends = references(results.values())

    def found(method: str, budget: str | None, rate: float | None) -> list[dict[str, Any]]:
        return [results[cell] for cell in cells if cell.row == (method, budget, rate)]

    base = found("base", None, None)
    lines = [photos_line(base), line_of("base", None, None, base, ends)]
    for budget in (*experiment.budgets, None):
        for method in experiment.methods:
            if budget in budgets_of(method, experiment):
                lines.append(line_of(method, budget, rates[method], found(method, budget, rates[method]), ends))
    return lines


def steps_of(line: Line) -> list[int]:
    """After how many steps all of a line's cells were scored, by their curves."""
    recorded = [recorded_steps(result) for result in line.results]
    return recorded[0] if recorded and all(recorded) else []


def at_step(line: Line, step: int, ends: References) -> Line:
    """The line as it was before the end of its training.

    line: with curves. step: one of its `steps_of`. ends: what balance is measured between, see `references`.
    """
    results = [result_at(result, step) for result in line.results]
    return line_of(line.method, line.budget, line.learning_rate, results, ends)


def compared(lines: Sequence[Line], ours: str = OURS) -> list[tuple[Line, Line, list[str]]]:
    """Our line and each other one of the same budget, with the names of `COMPARED` that both have of the same subjects.

    lines: of the table. ours: the key in `TITLES` of the method that is compared.
    """
    mine = {line.budget: line for line in lines if line.method == ours}
    found = []
    for other in lines:
        if other.method in ("photos", "base", "full", ours) or other.budget not in mine:
            continue
        our = mine[other.budget]
        names = [name for name in COMPARED if our.scores[name] and our.scores[name].keys() == other.scores[name].keys()]
        found.append((our, other, names))
    return found


def differences(lines: Sequence[Line], ours: str = OURS) -> list[tuple[str, str, dict[str, Interval]]]:
    """Our method minus each other one of the same budget, paired by subject and seed: (budget, other, intervals).

    lines: of the table. ours: the key in `TITLES` of the method that is compared. Intervals are by name of `COMPARED`,
    without those that one of the two lines lacks.
    """
    return [
        (other.budget or "", other.name, {name: _interval(our, name, minus=other) for name in names})
        for our, other, names in compared(lines, ours)
    ]
