"""Compare GSOFT with LoRA, BOFT, OFT and full fine-tuning at nearly equal numbers of parameters.

    python -m eval.benchmark eval/experiments/fronts.yaml --out results/fronts

First every method's learning rate is chosen on a few subjects, then all run on all; a grid runs every size and rate on
all. Then all results go into one file, pictures onto a sheet for each subject, and `eval.report` makes tables, plots
and a page from these. Killed at any point, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval.cells import Cell, base_cells, grid_cells, main_cells, sweep_cells
from eval.comparison_folder import settled, with_encoders, write_settings
from eval.engines import ENGINES
from eval.engines.worker import Workers, cores_each
from eval.experiment import Experiment
from eval.methods import TITLES
from eval.plan import plan
from eval.report.grid import held_out_lines, read_grid
from eval.report.lines import Line, table_lines
from eval.report.rates import check_comparable, choose_learning_rates
from eval.report.write import write_report
from eval.results import PAGE_NAME, Results, all_results, collect_results
from eval.run_cell import NOISE
from eval.subject_sheets import write_subject_sheet
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError


def run_benchmark(
    experiment: Experiment, out: Path, engine: str = "local", workers: int = 1, cores: int | None = None
) -> None:
    """Run every cell that is not done yet, and write the report.

    experiment: the settings. out: the folder for results and report, made if it is not there. engine: a key of
    `ENGINES`. workers: cells at a time. cores: for each cell; by default this machine's, shared among `workers`.

    Raises UserError if the folder holds results of other settings, if models or encoders cannot be had, or if every
    training diverged.
    """
    experiment = with_encoders(settled(experiment, out), out)
    if not (out / PAGE_NAME).exists():  # a report keeps the settings that it was made with until it is replaced
        write_settings(experiment, out)
    run_cells = ENGINES[engine]

    def run_missing(what: str, cells: Sequence[Cell]) -> Results:
        done = all_results(out)
        missing = [cell for cell in dict.fromkeys(cells) if cell not in done]
        print(f"{what}: {len(cells)} cells, {len(missing)} of them to do")
        if missing and any(result.get("noise") != NOISE for result in done.values()):
            raise UserError(
                f"--out {out}: holds cells of an earlier version, whose pictures start from other noise, so new ones "
                "would not compare; choose another folder"
            )
        if missing:
            run_cells(experiment, missing, out, Workers(workers, cores or cores_each(workers)))
        return collect_results(out)

    # A base model of other weights is noticed here, where there are new seeds or subjects, and not after days.
    check_comparable(list(run_missing("base model and photos", base_cells(experiment)).values()))
    if experiment.grid:
        results = run_missing("grid", grid_cells(experiment))
        lines = held_out_lines(experiment, results, read_grid(experiment, results))
    else:
        results = run_missing("learning rates", sweep_cells(experiment))
        rates = choose_learning_rates(experiment, results)
        print("chosen: " + ", ".join(f"{TITLES[method]} {rate:g}" for method, rate in rates.items()))
        results = run_missing("comparison", main_cells(experiment, rates))
        lines = table_lines(experiment, results, rates)
    if experiment.sheets:
        write_sheets(experiment, lines, out)
    write_settings(experiment, out)
    for path in write_report(experiment, out):
        print(path)
    if all("diverged" in result for cell, result in results.items() if cell.method != "base"):
        raise UserError(f"--out {out}: every training diverged; give lower learning_rates")


def write_sheets(experiment: Experiment, lines: Sequence[Line], out: Path) -> None:
    """Put the pictures of the table's lines onto each subject's sheet.

    experiment: the settings. lines: of the table. out: the comparison's folder. Raises UserError if a picture is
    damaged.
    """
    shown = [line for line in lines if line.results]
    for subject in experiment.chosen_subjects():
        cells = [(line.label_of(subject.name), line.result_of(subject.name)) for line in shown]
        write_subject_sheet(subject, cells, out)


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiment", type=expanded_path, help="YAML file with an experiment's settings, see eval/experiment.py"
    )
    parser.add_argument("--out", type=expanded_path, required=True, help="folder for results and report")
    parser.add_argument("--subjects_dir", help="folder of subjects, or of photos of one, instead of the file's")
    parser.add_argument("--class_word", help="what the photos show, if the folder is of one subject")
    parser.add_argument(
        "--dry-run", action="store_true", help="list cells, sizes, time, disk and what can be detected; run nothing"
    )
    parser.add_argument(
        "--earlier",
        type=expanded_path,
        help="with --dry-run: folder of a finished comparison, whose spread says which difference this one can detect",
    )
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where cells run (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time (default: %(default)s)")
    parser.add_argument("--cores", type=int, help="for each cell (default: this machine's, shared among the workers)")
    args = parser.parse_args()
    for name in ("workers", "cores"):
        if (given := vars(args)[name]) is not None and given < 1:
            raise UserError(f"--{name} {given}: must be 1 or more")
    if args.earlier and not args.dry_run:
        raise UserError(f"--earlier {args.earlier}: only a dry run says what can be detected; give --dry-run as well")
    settings = read_yaml(args.experiment)
    settings |= {name: vars(args)[name] for name in ("subjects_dir", "class_word") if vars(args)[name]}
    experiment = Experiment.from_dict(settings, args.experiment)
    if args.dry_run:
        print(plan(experiment, args.out, args.workers, args.earlier))
    else:
        run_benchmark(experiment, args.out, args.engine, args.workers, args.cores)
    return 0


if __name__ == "__main__":
    run(main)
