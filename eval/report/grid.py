"""From the results of a grid to fronts with intervals, and to lines at settings that were chosen on other subjects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from eval.cells import Cell, base_cells, budgets_of, grid_cells
from eval.experiment import Experiment
from eval.methods import ABLATIONS
from eval.report.fronts import Pair, lead, lead_range, leads, measured, measures
from eval.report.held_out import NO_CHOICE, choices, chosen_means
from eval.report.intervals import RESAMPLES, Array, Estimate, estimate, resampled_weights, weighted
from eval.report.lines import (
    OURS,
    SCORES,
    Line,
    References,
    check_complete,
    line_of,
    photos_line,
    references,
    scores_of,
)
from eval.report.rates import check_comparable
from eval.results import Results, recorded_steps, result_at
from gsoft_diffusion.scoring import metrics

LEAST_WAY = 0.1  # in DINO, from base model to photos; of subjects that are nearer, a balance says little
PRIMARY = ("lora", "boft")  # at the medium size: the comparisons that decide, named before any result is seen
ONE_CHANGE = ("gsoft", *ABLATIONS)  # from our method


@dataclass(frozen=True)
class Setting:
    """Where a training stands: its learning rate, and after how many steps."""

    learning_rate: float
    step: int


@dataclass(frozen=True)
class Group:
    """A method at a size, with all of its settings; NaN wherever a training diverged.

    scores: `(N, 2, S, K, P)`, subject and prompt fidelity of each setting, subject, seed and prompt. balances:
    `(N, C, K)`, of the subjects that choose settings. means: by name of `SCORES`, `(N, S, K)`.
    """

    method: str
    budget: str | None
    settings: list[Setting]
    scores: Array
    balances: Array
    means: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """All scores of a grid.

    choosing: the subjects whose balance chooses settings. ends: `(2, 2, S, K, P)`, those of base model and photos,
    shaped like a setting's. references: what balance is measured between.
    """

    subjects: list[str]
    choosing: list[str]
    seeds: int
    ends: Array
    references: References
    groups: list[Group]


@dataclass(frozen=True)
class MethodFront:
    """What a method at a size reaches.

    points: `(N, 2)`, subject and prompt fidelity of each of its settings. estimates: of all `measures`, in their order.
    differences: our method's minus this one's, paired. lead: of our front over this one. shared: how far from the base
    model to the photos both fronts reach, which is what the lead is taken of. These are None for our method itself, and
    where it has not this size; what has one size is compared with our medium one.
    """

    method: str
    budget: str | None
    settings: list[Setting]
    points: Array
    estimates: list[Estimate]
    differences: list[Estimate] | None
    lead: Estimate | None
    shared: float | None


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
    ends_of = seed_averages(references(results.values()))
    ways = {subject: ends_of[subject, 0][1][0] - ends_of[subject, 0][0][0] for subject in subjects}
    choosing = [subject for subject in subjects if ways[subject] >= LEAST_WAY]
    if len(choosing) < 2:
        choosing = subjects
    ends_of = {key: ends for key, ends in ends_of.items() if key[0] in choosing}
    based = [[results[Cell("base", None, None, subject, seed)] for seed in seeds] for subject in subjects]
    base = np.array([[_by_prompt(result) for result in row] for row in based])  # (S, K, 2, P)
    ends = np.stack([base, np.array([[_photos_by_prompt(result) for result in row] for row in based])])
    shape = base.shape

    groups = []
    for method, budget in _groups(experiment):
        settings = [
            Setting(rate, step) for rate in experiment.rates_of(method, budget) for step in experiment.recorded_steps()
        ]
        scores = np.full((len(settings), *shape), np.nan)
        means = {name: np.full((len(settings), len(subjects), len(seeds)), np.nan) for name in SCORES}
        for number, setting in enumerate(settings):
            for i, subject in enumerate(subjects):
                for seed in seeds:
                    result = results[Cell(method, budget, setting.learning_rate, subject, seed)]
                    if "scores" not in result:
                        continue
                    found = result_at(result, setting.step)
                    scores[number, i, seed] = _by_prompt(found)
                    for name, value in scores_of(found, ends_of).items():
                        means[name][number, i, seed] = value
        balances = means["balance"][:, [subjects.index(subject) for subject in choosing]]
        groups.append(Group(method, budget, settings, np.moveaxis(scores, 3, 1), balances, means))
    return Grid(subjects, choosing, experiment.seeds, np.moveaxis(ends, 3, 1), ends_of, groups)


def seed_averages(ends: References) -> References:
    """What balance is measured between, with the base model's scores averaged over the seeds of a subject.

    ends: as `references` gives them. One seed's few pictures would move an end by as much as methods differ.
    """
    averaged: References = {}
    for subject in dict.fromkeys(subject for subject, _ in ends):
        of_seeds = [pair for (name, _), pair in ends.items() if name == subject]
        base = tuple(metrics.mean([pair[0][place] for pair in of_seeds]) for place in range(2))
        for name, seed in ends:
            if name == subject:
                averaged[name, seed] = _pair(base), ends[name, seed][1]
    return averaged


def _groups(experiment: Experiment) -> list[tuple[str, str | None]]:
    """Methods at their sizes, in the order of tables: sizes, and what has one size at the end."""
    return [
        (method, budget)
        for budget in (*experiment.budgets, None)
        for method in experiment.methods
        if budget in budgets_of(method, experiment)
    ]


def _photos_by_prompt(result: Mapping[str, Any]) -> Array:
    """Subject and prompt fidelity of the photos themselves for each context prompt of the base model, `(2, P)`."""
    captions = dict.fromkeys(picture["caption"] for picture in result["pictures"] if picture["kind"] == "context")
    photos = result["photos"]
    return np.array([[photos["dino"]] * len(captions), [photos["clip_t_by_caption"][caption] for caption in captions]])


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
    drawn_points = [weighted(group.scores, weights) for group in grid.groups]
    draws = [measured(each, drawn_ends) for each in drawn_points]
    ours = {group.budget: number for number, group in enumerate(grid.groups) if group.method == OURS}

    def estimates(value: Array, drawn: Array) -> list[Estimate]:
        return [estimate(float(v), d, *shape[:2]) for v, d in zip(value, drawn.T, strict=True)]

    found = []
    for number, group in enumerate(grid.groups):
        mine = ours.get(group.budget or "medium")
        paired = our_lead = shared = None
        if mine not in (None, number):
            paired = estimates(values[mine] - values[number], draws[mine] - draws[number])
            drawn = leads(drawn_points[mine], drawn_points[number], drawn_ends)
            our_lead = estimate(lead(points[mine], points[number], base, photos), drawn, *shape[:2])
            shared = lead_range(points[mine], points[number], base, photos)
        own = estimates(values[number], draws[number])
        found.append(
            MethodFront(group.method, group.budget, group.settings, points[number], own, paired, our_lead, shared)
        )
    return Fronts(base, photos, found)


def pseudo_leads(grid: Grid) -> list[list[float]]:
    """What each subject contributes to the leads that decide: jackknife pseudo-values, `S·ℓ − (S − 1)·ℓ₋ₛ`.

    grid: the scores. `ℓ` is the lead on all S subjects, `ℓ₋ₛ` that without a subject. One list for each method of
    `PRIMARY` at the medium size; those that have no lead without a subject are left out.
    """
    by_method = {group.method: group.scores for group in grid.groups if group.budget == "medium"}
    count = len(grid.subjects)

    def lead_of(other: str, kept: list[int]) -> float:
        ours, others = (by_method[name][:, :, kept].mean(axis=(2, 3, 4)) for name in (OURS, other))
        base, photos = grid.ends[:, :, kept].mean(axis=(2, 3, 4))
        return lead(ours, others, _pair(base), _pair(photos))

    found = []
    for method in PRIMARY:
        if OURS in by_method and method in by_method:
            whole = lead_of(method, list(range(count)))
            without = [lead_of(method, [place for place in range(count) if place != left]) for left in range(count)]
            found.append([count * whole - (count - 1) * each for each in without])
    return [values for values in found if np.isfinite(values).all()]


def _pair(values: Iterable[float]) -> Pair:
    subject, prompt = values
    return float(subject), float(prompt)


def _places(grid: Grid) -> list[int | None]:
    """For each subject its place among those that choose settings; None if it is not one of them."""
    return [grid.choosing.index(subject) if subject in grid.choosing else None for subject in grid.subjects]


def _chosen_once(group: Group, grid: Grid) -> list[int]:
    """For each subject the number of the group's setting that is best on all others, or `NO_CHOICE`."""
    equal = np.ones((1, *group.balances.shape[1:]))
    return choices(group.balances, _places(grid), equal)[0].tolist()


def held_out_lines(experiment: Experiment, results: Results, grid: Grid) -> list[Line]:
    """Lines as `table_lines` gives them, but each subject at the setting that was best on all other subjects.

    experiment: the settings. results: of all cells. grid: their scores, of two or more subjects. A method whose chosen
    setting diverged on its subject, or all of whose settings diverged, has a line without scores. Intervals know that
    the settings were chosen.
    """
    base = [results[cell] for cell in base_cells(experiment)]
    lines = [photos_line(base), line_of("base", None, None, base, grid.references)]
    weights = resampled_weights((len(grid.subjects), grid.seeds, 1))[..., 0]
    for group in grid.groups:
        settings = {
            subject: group.settings[0 if number == NO_CHOICE else number]  # others diverged: the line has no scores
            for subject, number in zip(grid.subjects, _chosen_once(group, grid), strict=True)
        }
        line = _line_at(settings, group.method, group.budget, results, grid)
        lines.append(replace(line, resampled=_resampled(group, grid, weights)))
    return lines


def _line_at(settings: Mapping[str, Setting], method: str, budget: str | None, results: Results, grid: Grid) -> Line:
    """The line of a method, each subject at its setting; as a training ended, if it diverged."""
    found = []
    for subject, setting in settings.items():
        for seed in range(grid.seeds):
            result = results[Cell(method, budget, setting.learning_rate, subject, seed)]
            found.append(result_at(result, setting.step) if recorded_steps(result) else result)
    return line_of(method, budget, None, found, grid.references)


def _resampled(group: Group, grid: Grid, weights: Array) -> dict[str, Array]:
    """By name of `SCORES` the mean of a score in each resample, which chooses each subject's setting on its others.

    weights: `(resamples, S, K)`.
    """
    choosing = [grid.subjects.index(subject) for subject in grid.choosing]
    chosen = choices(group.balances, _places(grid), weights[:, choosing])
    scored = {name: choosing if name == "balance" else list(range(len(grid.subjects))) for name in SCORES}
    return {
        name: chosen_means(group.means[name][:, places], chosen[:, places], weights[:, places])
        for name, places in scored.items()
    }


def knees(grid: Grid) -> dict[str, Setting]:
    """For each subject the setting of our medium method that is best, by balance, on the others; nothing without it.

    grid: the scores. These settings are at the knee of our front, and no subject's own scores chose its own.
    """
    for group in grid.groups:
        if (group.method, group.budget) == (OURS, "medium"):
            chosen = _chosen_once(group, grid)
            if NO_CHOICE not in chosen:
                return {subject: group.settings[n] for subject, n in zip(grid.subjects, chosen, strict=True)}
    return {}


def ablation_lines(results: Results, grid: Grid) -> list[Line]:
    """Our method at its `knees` and, at the same settings, what one thing changes in it; nothing without such methods.

    results: of all cells. grid: their scores. Intervals take the settings as given.
    """
    settings = knees(grid)
    methods = [
        group.method
        for group in grid.groups
        if group.budget == "medium" and group.method in ONE_CHANGE and set(settings.values()) <= set(group.settings)
    ]
    if not settings or not methods:
        return []
    return [_line_at(settings, method, "medium", results, grid) for method in (OURS, *methods)]
