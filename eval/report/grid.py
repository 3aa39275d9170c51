"""From the results of a grid to fronts with intervals, and to lines at settings that were chosen on other subjects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.experiment import Cell, Experiment, base_cells, budgets_of, grid_cells
from eval.report.fronts import (
    RESAMPLES,
    Array,
    Estimate,
    Pair,
    estimate,
    held_out,
    measured,
    measures,
    resampled_weights,
    weighted,
)
from eval.report.lines import OURS, Line, check_complete, line_of, photos_line, references
from eval.report.rates import check_comparable
from eval.results import Results, recorded_steps, result_at
from gsoft_diffusion.scoring import metrics


@dataclass(frozen=True)
class Setting:
    """Where a training stands: its learning rate, and after how many steps."""

    learning_rate: float
    step: int


@dataclass(frozen=True)
class Group:
    """A method at a size, with all of its settings; NaN wherever a training diverged.

    scores: `(N, 2, S, K, P)`, subject and prompt fidelity of each setting, subject, seed and prompt. balances:
    `(N, S, K)`.
    """

    method: str
    budget: str | None
    settings: list[Setting]
    scores: Array
    balances: Array


@dataclass(frozen=True)
class Grid:
    """All scores of a grid.

    ends: `(2, 2, S, K, P)`, those of base model and photos, shaped like a setting's.
    """

    subjects: list[str]
    seeds: int
    ends: Array
    groups: list[Group]


@dataclass(frozen=True)
class MethodFront:
    """What a method at a size reaches.

    points: `(N, 2)`, subject and prompt fidelity of each of its settings. estimates: of all `measures`, in their order.
    differences: our method's minus this one's, paired; None for our method itself and where it has not this size.
    """

    method: str
    budget: str | None
    settings: list[Setting]
    points: Array
    estimates: list[Estimate]
    differences: list[Estimate] | None


@dataclass(frozen=True)
class Fronts:
    """All fronts of a grid, and the ends that their areas lie between."""

    base: Pair
    photos: Pair
    methods: list[MethodFront]


def read_grid(experiment: Experiment, results: Results) -> Grid:
    """The scores of all cells of a grid.

    experiment: says which cells those are. results: of these and of the base model. Raises UserError if cells are
    missing or do not compare.
    """
    cells = grid_cells(experiment)
    check_complete([*base_cells(experiment), *cells], results)
    check_comparable(list(results.values()))
    subjects, seeds = experiment.subject_names(), range(experiment.seeds)
    ends_of = references(results.values())
    based = [[results[Cell("base", None, None, subject, seed)] for seed in seeds] for subject in subjects]
    base = np.array([[_by_prompt(result) for result in row] for row in based])  # (S, K, 2, P)
    photos = np.array([[[result["photos"]["dino"], result["photos"]["clip_t"]] for result in row] for row in based])
    ends = np.stack([base, np.broadcast_to(photos[..., None], base.shape)])
    shape = base.shape

    def scores_of(cell: Cell, step: int) -> tuple[Array, float]:
        if "scores" not in results[cell]:
            return np.full(shape[2:], np.nan), np.nan
        found = result_at(results[cell], step)
        balance = metrics.balance(found["scores"]["dino"], found["scores"]["clip_t"], *ends_of[cell.subject, cell.seed])
        return _by_prompt(found), balance

    groups = []
    for method, budget in _groups(experiment):
        settings = [
            Setting(rate, step)
            for rate in getattr(experiment.learning_rates, method)
            for step in experiment.recorded_steps()
        ]
        scores, balances = np.empty((len(settings), *shape)), np.empty((len(settings), *shape[:2]))
        for number, setting in enumerate(settings):
            for i, subject in enumerate(subjects):
                for seed in seeds:
                    cell = Cell(method, budget, setting.learning_rate, subject, seed)
                    scores[number, i, seed], balances[number, i, seed] = scores_of(cell, setting.step)
        groups.append(Group(method, budget, settings, np.moveaxis(scores, 3, 1), balances))
    return Grid(subjects, experiment.seeds, np.moveaxis(ends, 3, 1), groups)


def _groups(experiment: Experiment) -> list[tuple[str, str | None]]:
    """Methods at their sizes, in the order of tables: sizes, and what has one size at the end."""
    return [
        (method, budget)
        for budget in (*experiment.budgets, None)
        for method in experiment.methods
        if budget in budgets_of(method, experiment)
    ]


def _by_prompt(result: Mapping[str, Any]) -> Array:
    """Subject and prompt fidelity of each context prompt, `(2, P)`, averaged over its pictures."""
    by_prompt: dict[str, list[Mapping[str, float]]] = {}
    for picture in result["pictures"]:
        if picture["kind"] == "context":
            by_prompt.setdefault(picture["prompt"], []).append(picture)
    return np.array(
        [
            [metrics.mean([picture[name] for picture in pictures]) for pictures in by_prompt.values()]
            for name in ("dino", "clip_t")
        ]
    )


def compare_fronts(grid: Grid, resamples: int = RESAMPLES) -> Fronts:
    """All fronts with their intervals, and what our method's front has more than the others of its size.

    grid: the scores. resamples: how many are drawn, the same for all methods.
    """
    shape = grid.ends.shape[2:]
    once, weights = np.full((1, *shape), 1 / np.prod(shape)), resampled_weights(shape, resamples)
    (ends,), drawn_ends = weighted(grid.ends, once), weighted(grid.ends, weights)
    base, photos = _pair(ends[0]), _pair(ends[1])
    points = [weighted(group.scores, once)[0] for group in grid.groups]
    values = [np.array(measures(each, base, photos)) for each in points]
    draws = [measured(weighted(group.scores, weights), drawn_ends) for group in grid.groups]
    ours = {group.budget: number for number, group in enumerate(grid.groups) if group.method == OURS}

    def estimates(value: Array, drawn: Array) -> list[Estimate]:
        return [estimate(float(v), d, *shape[:2]) for v, d in zip(value, drawn.T, strict=True)]

    found = []
    for number, group in enumerate(grid.groups):
        mine = ours.get(group.budget)
        paired = (
            None if mine in (None, number) else estimates(values[mine] - values[number], draws[mine] - draws[number])
        )
        own = estimates(values[number], draws[number])
        found.append(MethodFront(group.method, group.budget, group.settings, points[number], own, paired))
    return Fronts(base, photos, found)


def _pair(values: Iterable[float]) -> Pair:
    subject, prompt = values
    return float(subject), float(prompt)


def held_out_lines(experiment: Experiment, results: Results, grid: Grid) -> list[Line]:
    """Lines as `table_lines` gives them, but each subject at the setting that was best on all other subjects.

    experiment: the settings. results: of all cells. grid: their scores, of two or more subjects. A method that diverged
    in all of its settings has a line without scores.
    """
    ends = references(results.values())
    base = [results[cell] for cell in base_cells(experiment)]
    lines = [photos_line(base), line_of("base", None, None, base, ends)]
    for group in grid.groups:
        balances = group.balances.mean(axis=2)
        usable = np.isfinite(balances).all(axis=1).any()
        chosen = held_out(balances) if usable else [0] * len(grid.subjects)
        found = []
        for subject, number in zip(grid.subjects, chosen, strict=True):
            setting = group.settings[number]
            for seed in range(grid.seeds):
                result = results[Cell(group.method, group.budget, setting.learning_rate, subject, seed)]
                found.append(result_at(result, setting.step) if recorded_steps(result) else result)
        lines.append(line_of(group.method, group.budget, None, found, ends))
    return lines
