"""All files of a report, from a comparison's results and its sheets."""

from __future__ import annotations

from pathlib import Path

from eval.experiment import Experiment
from eval.methods import METHODS
from eval.report.introduction import introduction
from eval.report.lines import OURS, references, sweep_lines, table_lines
from eval.report.page import page
from eval.report.plots import curve_plot, pareto_plot, sweep_plot
from eval.report.rates import choose_learning_rates
from eval.report.tables import csv_rows, csv_text, difference_rows, markdown_table, sweep_rows, table_rows
from eval.results import PAGE_NAME, read_results
from gsoft_diffusion.foundation.files import whole_file


def write_report(experiment: Experiment, out: Path) -> list[Path]:
    """Write all files of the report; returns their paths, the page with the pictures last.

    experiment: the settings. out: the comparison's folder, with `results.jsonl` and the sheets. Raises UserError if any
    of these is missing, damaged or incomplete.
    """
    results = read_results(out)
    chosen = choose_learning_rates(experiment, results)
    lines = table_lines(experiment, results, chosen)
    swept = sweep_lines(experiment, results)
    sweep = sweep_rows(swept, chosen, references(results.values()))
    shown = [result for line in lines for result in line.results]
    encoders = shown[0]["encoders"]
    miniature = encoders["clip"]["miniature"] or encoders["dino"]["miniature"]
    plots = {
        "pareto": pareto_plot(lines, miniature),
        "learning_rates": sweep_plot(swept, chosen, miniature),
        "curves": curve_plot(lines, miniature),
    }
    sections = {
        "": introduction(experiment, lines, shown, encoders),
        "Scores": markdown_table(table_rows(lines)),
        f"{METHODS[OURS]} against the others": markdown_table(difference_rows(lines)),
        "Learning rates": markdown_table(sweep),
    }
    texts = {
        "report.md": "\n\n".join(
            f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text
        ),
        "table.csv": csv_text(csv_rows(lines)),
        "learning_rates.csv": csv_text(sweep),
        **{f"{name}.svg": svg for name, svg in plots.items() if svg},
        PAGE_NAME: page(experiment, out, lines, sections, plots),
    }
    for name, text in texts.items():
        with whole_file(out / name) as file:
            file.write(f"{text.rstrip()}\n".encode())
    return [out / name for name in texts]
