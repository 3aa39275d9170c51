"""The cells of a comparison: the jobs that its settings make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eval.experiment import Experiment, rate_name


@dataclass(frozen=True)
class Cell:
    """One independent job: train one method on one subject with one seed, draw and score.

    method: a key of `TITLES`, or `base`, which trains nothing.
    budget, learning_rate: None where the method has none.
    """

    method: str
    budget: str | None
    learning_rate: float | None
    subject: str
    seed: int

    @property
    def id(self) -> str:
        """Names its folder, and its row on a sheet."""
        parts = [self.method, self.budget, self.learning_rate and f"lr{rate_name(self.learning_rate)}", self.subject]
        return "--".join([str(part) for part in parts if part is not None] + [f"seed{self.seed}"])

    @property
    def row(self) -> tuple[str, str | None, float | None]:
        """The row of the table that it belongs to."""
        return self.method, self.budget, self.learning_rate


def scorings(experiment: Experiment, cell: Cell) -> int:
    """How often a cell draws and scores all its pictures: at the end, and at the steps that are recorded before."""
    recorded = cell.method != "base" and experiment.recorded_every(cell.seed)
    return len(experiment.recorded_steps()) if recorded else 1


def budgets_of(method: str, experiment: Experiment) -> tuple[str | None, ...]:
    """The budgets that a method is trained at: None alone for full fine-tuning and the base model, which have one size.

    method: a key of `TITLES`, or `base`. experiment: says which budgets there are.
    """
    if method in ("full", "base"):
        return (None,)
    return ("medium",) if method in experiment.medium_only else experiment.budgets


def sweep_cells(experiment: Experiment) -> list[Cell]:
    """The cells that choose every method's learning rate; none for a method that has only one."""
    subjects = experiment.subject_names()[: experiment.sweep_subjects]
    return [
        Cell(method, None if method == "full" else experiment.sweep_budget, rate, subject, 0)
        for method in experiment.methods
        if len(getattr(experiment.learning_rates, method)) > 1
        for rate in getattr(experiment.learning_rates, method)
        for subject in subjects
    ]


def grid_cells(experiment: Experiment) -> list[Cell]:
    """Every method at every size and learning rate, on all subjects and seeds."""
    return [
        Cell(method, budget, rate, subject, seed)
        for seed in range(experiment.seeds)
        for subject in experiment.subject_names()
        for method in experiment.methods
        for budget in budgets_of(method, experiment)
        for rate in experiment.rates_of(method, budget)
    ]


def base_cells(experiment: Experiment) -> list[Cell]:
    """The base model's own pictures, the reference for the trade-off."""
    return [
        Cell("base", None, None, subject, seed)
        for subject in experiment.subject_names()
        for seed in range(experiment.seeds)
    ]


def main_cells(experiment: Experiment, rates: Mapping[str, float]) -> list[Cell]:
    """The comparison itself. Cells of the sweep come again, and are done.

    experiment: the settings. rates: the learning rate that was chosen for each method.
    """
    return [
        Cell(method, budget, rates[method], subject, seed)
        for seed in range(experiment.seeds)
        for subject in experiment.subject_names()
        for method in experiment.methods
        for budget in budgets_of(method, experiment)
    ]
