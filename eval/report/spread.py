"""How far differences between methods scatter over subjects in a finished comparison."""

from __future__ import annotations

from pathlib import Path

from eval.experiment import Experiment
from eval.report.grid import PRIMARY, compare_fronts, pseudo_leads, read_grid
from eval.report.intervals import pooled_deviation
from eval.report.lines import compared, table_lines
from eval.report.rates import choose_learning_rates
from eval.results import SETTINGS, Results, read_results
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError


def spread_of_differences(out: Path, grid: bool) -> float:
    """The standard deviation over subjects of our method's lead over another, or of its difference in balance.

    It is pooled over the other methods.

    out: folder of a comparison. grid: whether the lead of our front is meant, by what each subject contributes to the
    leads that decide; else our balance minus the other's, each subject's a mean over its seeds. Raises UserError if the
    folder has no complete comparison of our method with another on two or more subjects, or not of this kind.
    """
    experiment, results = _read(out)
    if experiment.grid != grid:
        raise UserError(
            f"{out}: is {'a' if experiment.grid else 'no'} grid, so its spread is not that of this comparison"
        )
    if grid:
        differences = pseudo_leads(read_grid(experiment, results))
    else:
        lines = table_lines(experiment, results, choose_learning_rates(experiment, results))
        differences = [
            (our.values("balance") - other.values("balance")).mean(axis=1).tolist()
            for our, other, names in compared(lines)
            if "balance" in names
        ]
    differences = [each for each in differences if len(each) > 1]
    if not differences:
        raise UserError(f"{out}: has no differences between methods on two or more subjects, so no spread of them")
    return pooled_deviation(differences)


def reach_of_intervals(out: Path) -> tuple[float, int] | None:
    """How far the intervals of the leads that decide reach to either side, and how many subjects these are of.

    out: folder of a finished grid. Returns the longer of the two; None where leads have no intervals. Raises UserError
    as `spread_of_differences`.
    """
    grid = read_grid(*_read(out))
    widths = [
        each.lead.half_width
        for each in compare_fronts(grid).methods
        if each.budget == "medium" and each.method in PRIMARY and each.lead and each.lead.half_width is not None
    ]
    return (max(widths), len(grid.subjects)) if widths else None


def _read(out: Path) -> tuple[Experiment, Results]:
    if not (out / SETTINGS).is_file():
        raise UserError(f"{out}: holds no {SETTINGS} of a comparison; give a folder that eval.benchmark wrote to")
    return Experiment.from_dict(read_yaml(out / SETTINGS)), read_results(out)
