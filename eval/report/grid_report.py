"""The report of a grid: pictures and fronts first, then a verdict in words and the tables."""

from __future__ import annotations

from eval.experiment import Experiment
from eval.methods import TITLES
from eval.report.front_tables import (
    area_rows,
    chosen_rows,
    measure_rows,
    prompt_rows,
    setting_rows,
    subject_rows,
    verdict_text,
)
from eval.report.grid import ablation_lines, compare_fronts, held_out_lines, read_grid
from eval.report.introduction import introduction
from eval.report.lines import OURS
from eval.report.page import PICTURES, Report
from eval.report.plots import front_plot
from eval.report.tables import csv_rows, csv_text, difference_rows, markdown_table, table_rows
from eval.results import Results

HELD_OUT = (
    "Each subject is scored at the learning rate and step of the best mean balance on all other subjects, so none of "
    "its own scores chose the setting. The settings are listed below. Among settings that are nearly equal, chance "
    "chooses. Intervals know of that, since every resample chooses anew (eval/report/held_out.py). That takes four "
    "subjects or more."
)
FRONTS = (
    "Lead is how much more of the prompt the front of Double GSOFT keeps, averaged over the subject fidelities that "
    "both fronts reach, as a share of the way from the photos' prompt fidelity to the base model's. The table says up "
    "to which share of the way from base model to photos that is. A front is the upper concave hull of a method's "
    "settings and the base model. Area also counts how far the settings reach that were tried (eval/report/fronts.py)."
)
KNEE = (
    "Each subject is at the setting of Double GSOFT at the medium size that is best, by balance, on the other "
    "subjects. The other lines have the same settings, and one thing changed. They are given no setting of their own, "
    "which favours Double GSOFT: the lines above, each at its own setting, are the fair comparison. Intervals take "
    "these settings as given."
)
LEVELS = (
    "Levels are 25, 50 and 75 % of the way between base model and photos. Between two settings a front is a straight "
    "line. Beyond its first and last setting nothing is said."
)


def grid_report(experiment: Experiment, results: Results) -> Report:
    """The report's parts.

    experiment: the settings. results: of all cells. Raises UserError if cells are missing or do not compare.
    """
    grid = read_grid(experiment, results)
    fronts = compare_fronts(grid)
    lines = held_out_lines(experiment, results, grid)
    shown = [result for line in lines for result in line.results]
    encoders = shown[0]["encoders"]
    miniature = encoders["clip"]["miniature"] or encoders["dino"]["miniature"]
    settings = setting_rows(fronts, grid)
    ablations = ablation_lines(results, grid)
    sections: dict[str, str] = {
        "": introduction(experiment, lines, shown, encoders),
        **({PICTURES: ""} if experiment.sheets else {}),
        "Fronts": "",
        "Verdict": verdict_text(fronts, lines, grid, experiment.difference_sd),
        "Lead and area": f"{FRONTS}\n\n{markdown_table(area_rows(fronts))}",
        "Prompt fidelity at equal subject fidelity": f"{LEVELS}\n\n{markdown_table(prompt_rows(fronts))}",
        "Subject fidelity at equal prompt fidelity": markdown_table(subject_rows(fronts)),
        "One setting for each, chosen on the other subjects": (f"{HELD_OUT}\n\n{markdown_table(table_rows(lines))}"),
        f"{TITLES[OURS]} against the others, at these settings": markdown_table(difference_rows(lines)),
        **(
            {
                f"Ablations at the knee of {TITLES[OURS]}": "\n\n".join(
                    [
                        KNEE,
                        markdown_table(table_rows(ablations)),
                        markdown_table(difference_rows(ablations)),
                    ]
                )
            }
            if ablations
            else {}
        ),
        "The settings that were chosen": markdown_table(chosen_rows(lines, grid)),
        "All settings": markdown_table(settings),
    }
    return Report(
        lines,
        sections,
        {"Fronts": {"fronts": front_plot(fronts, miniature)}},
        {
            "table.csv": csv_text(csv_rows(lines)),
            "fronts.csv": csv_text(measure_rows(fronts)),
            "settings.csv": csv_text(settings),
        },
    )
