"""The report of a comparison whose learning rates were chosen in a sweep: the pictures, then tables and plots."""

from __future__ import annotations

from eval.experiment import Experiment
from eval.methods import TITLES
from eval.report.introduction import introduction
from eval.report.lines import OURS, references, sweep_lines, table_lines
from eval.report.page import PICTURES, Report
from eval.report.plots import curve_plot, pareto_plot, sweep_plot
from eval.report.rates import choose_learning_rates
from eval.report.tables import csv_rows, csv_text, difference_rows, markdown_table, sweep_rows, table_rows
from eval.results import Results


def sweep_report(experiment: Experiment, results: Results) -> Report:
    """The report's parts.

    experiment: the settings. results: of all cells. Raises UserError if cells are missing or do not compare.
    """
    chosen = choose_learning_rates(experiment, results)
    lines = table_lines(experiment, results, chosen)
    swept = sweep_lines(experiment, results)
    sweep = sweep_rows(swept, chosen, references(results.values()))
    shown = [result for line in lines for result in line.results]
    encoders = shown[0]["encoders"]
    miniature = encoders["clip"]["miniature"] or encoders["dino"]["miniature"]
    plots = {
        "Scores": {"pareto": pareto_plot(lines, miniature), "curves": curve_plot(lines, miniature)},
        "Learning rates": {"learning_rates": sweep_plot(swept, chosen, miniature)},
    }
    sections = {
        "": introduction(experiment, lines, shown, encoders),
        **({PICTURES: ""} if experiment.sheets else {}),
        "Scores": markdown_table(table_rows(lines)),
        f"{TITLES[OURS]} against the others": markdown_table(difference_rows(lines)),
        "Learning rates": markdown_table(sweep),
    }
    drawn = {title: {name: svg for name, svg in each.items() if svg} for title, each in plots.items()}
    return Report(
        lines, sections, drawn, {"table.csv": csv_text(csv_rows(lines)), "learning_rates.csv": csv_text(sweep)}
    )
