"""All files of a report, from a comparison's results and its sheets."""

from __future__ import annotations

from pathlib import Path

from eval.experiment import Experiment
from eval.report.grid_report import grid_report
from eval.report.page import page
from eval.report.sweep_report import sweep_report
from eval.results import PAGE_NAME, read_results
from gsoft_diffusion.foundation.files import whole_file


def write_report(experiment: Experiment, out: Path) -> list[Path]:
    """Write all files of the report; returns their paths, the page with the pictures last.

    experiment: the settings. out: the comparison's folder, with `results.jsonl` and the sheets. Raises UserError if any
    of these is missing, damaged or incomplete.
    """
    report = (grid_report if experiment.grid else sweep_report)(experiment, read_results(out))
    texts = {
        "report.md": "\n\n".join(
            f"## {title}\n\n{text}" if title else text for title, text in report.sections.items() if text
        ),
        **report.tables,
        **{f"{name}.svg": svg for plots in report.plots.values() for name, svg in plots.items()},
        PAGE_NAME: page(experiment, out, report),
    }
    for name, text in texts.items():
        with whole_file(out / name) as file:
            file.write(f"{text.rstrip()}\n".encode())
    return [out / name for name in texts]
