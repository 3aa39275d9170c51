"""Compare GSOFT with LoRA, BOFT, OFT and full fine-tuning at nearly equal numbers of parameters.

    python -m eval.benchmark eval/experiments/fronts.yaml --out results/fronts

First every method's learning rate is chosen on a few subjects, then all run on all; a grid runs every size and rate on
all. Then all results go into one file, pictures onto a sheet for each subject, and `eval.report` makes tables, plots
and a page from these. Killed at any point, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.baselines import BaselineConfig, adapted_layers
from eval.cell_pictures import pictures_of
from eval.cells import Cell, base_cells, budgets_of, grid_cells, main_cells, scorings, sweep_cells
from eval.engines import ENGINES
from eval.engines.worker import Workers, cores_each
from eval.experiment import Experiment
from eval.methods import TITLES, adapts_text_encoder, count_parameters, describe, matched
from eval.prompts import prompts_for
from eval.report.grid import held_out_lines, read_grid
from eval.report.intervals import POWER, detectable_by, detectable_difference, half_width_of_more
from eval.report.lines import Line, table_lines
from eval.report.rates import check_comparable, choose_learning_rates
from eval.report.spread import reach_of_intervals, spread_of_differences
from eval.report.write import write_report
from eval.results import PAGE_NAME, SETTINGS, Results, all_results, collect_results
from eval.run_cell import NOISE, photos_hash
from eval.subject_sheets import write_subject_sheet
from eval.subjects import Subject
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import whole_file
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import fetch_model, load_model
from gsoft_diffusion.scoring.encoders import load_encoders

FREE_TO_CHANGE = {  # they decide which cells there are and what is shown of them, not what is in one
    *("seeds", "subjects", "methods", "budgets", "medium_only", "learning_rates", "sweep_subjects", "sweep_budget"),
    *("learning_rates_small", "learning_rates_large"),
    "subjects_dir",  # the photos are compared themselves
    *("seconds_per_step", "seconds_per_picture", "difference_sd", "sheets"),
}
BYTES_A_PIXEL = 1.6  # of generated pictures as PNG
BYTES_A_ROW, BYTES_A_COLUMN = 400, 50  # of results.jsonl for a picture: at the end of training, and before


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
    for path in write_report(experiment, out):
        print(path)
    if all("diverged" in result for cell, result in results.items() if cell.method != "base"):
        raise UserError(f"--out {out}: every training diverged; give lower learning_rates")


def settled(experiment: Experiment, out: Path) -> Experiment:
    """The experiment with paths that hold in any folder, its subjects by name, and encoders that the folder has.

    experiment: as it was given. out: the folder for its results, which need not be there. Raises UserError if a subject
    has fewer than two photos, or if the folder holds cells of other settings or photos, or a report of more than would
    come out now.
    """
    subjects = experiment.chosen_subjects()
    for subject in subjects:
        if len(subject.photos()) < 2:
            raise UserError(f"{subject.folder}: the balance needs at least two photos, to compare them with each other")
    if experiment.grid and len(subjects) < 2:
        raise UserError(
            "grid: chooses each subject's setting on the others; give two subjects or more, or leave it out"
        )
    experiment = replace(experiment.anchored(), subjects=tuple(subject.name for subject in subjects))
    if not (out / SETTINGS).exists():
        return experiment
    before = Experiment.from_dict(read_yaml(out / SETTINGS)).anchored()
    kept: Any = {name: getattr(before, name) for name in ("clip", "dino") if getattr(experiment, name) == "auto"}
    experiment = replace(experiment, **kept)
    now, then = experiment.to_dict(), before.to_dict()
    if changed := [name for name in now if now[name] != then[name] and name not in FREE_TO_CHANGE]:
        names = ", ".join(f"{name} is {now[name]} and was {then[name]}" for name in changed)
        raise UserError(f"--out {out}: holds results of other settings ({names}); choose another folder")
    photos = {subject.name: photos_hash(subject) for subject in subjects}
    done = all_results(out)
    learned = {cell.subject: result["photos_hash"] for cell, result in done.items()}
    if others := [name for name, known in learned.items() if photos.get(name, known) != known]:
        raise UserError(
            f"--out {out}: holds cells of other photos of {', '.join(others)} than {experiment.subjects_dir} has; put "
            "them back, or choose another folder"
        )
    if others := [subject.name for subject in subjects if _other_prompts(experiment, subject, done)]:
        raise UserError(
            f"--out {out}: holds cells of other prompts of {', '.join(others)} than {experiment.prompts} has; put them "
            "back, or choose another folder"
        )
    if (out / PAGE_NAME).exists() and (lost := left_out(before, experiment)):
        raise UserError(
            f"--out {out}: its report has {', '.join(lost)} as well, which these settings leave out; put them back, "
            "or choose another folder (with a copy of results.jsonl and sheets, these need not run again)"
        )
    return experiment


def _other_prompts(experiment: Experiment, subject: Subject, done: Results) -> bool:
    """Whether a subject has cells of tuned models that were asked for something else than it would be now."""
    found = {
        (each["kind"], each["prompt"])
        for cell, result in done.items()
        if cell.subject == subject.name and cell.method != "base"
        for each in result.get("pictures", [])
    }
    prompts = prompts_for(subject, experiment.unique_token, experiment.prompts, experiment.max_prompts)
    return bool(found) and found != {(prompt.kind, prompt.text) for prompt in prompts}


def with_encoders(experiment: Experiment, out: Path) -> Experiment:
    """The experiment with its encoders by name, which it says. What cells need of the hub is on this machine then.

    experiment: its base model and encoders are fetched, here once, and not in every cell. out: the folder of its
    results. Raises UserError if base or encoders cannot be had, or if the folder's cells were scored by others.
    """
    fetch_model(experiment.pretrained_model_name_or_path)
    encoders = load_encoders(experiment.clip, experiment.dino)
    print(f"encoders: {encoders}", flush=True)
    now = json.loads(json.dumps(encoders.to_dict()))
    if others := [result["encoders"] for result in all_results(out).values() if result["encoders"] != now]:
        names = " and ".join(encoder["name"] for encoder in others[0].values())
        raise UserError(f"--out {out}: holds cells that other encoders scored ({names}); choose another folder")
    return replace(experiment, **encoders.names)


def write_settings(experiment: Experiment, out: Path) -> None:
    """Write `experiment.yaml`, complete or not at all.

    experiment: what is written. out: the folder, made if it is not there. Raises UserError if it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(out / SETTINGS) as file:
            file.write(experiment.to_yaml().encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error


def write_sheets(experiment: Experiment, lines: Sequence[Line], out: Path) -> None:
    """Put the pictures of the table's lines onto each subject's sheet.

    experiment: the settings. lines: of the table. out: the comparison's folder. Raises UserError if a picture is
    damaged.
    """
    shown = [line for line in lines if line.results]
    for subject in experiment.chosen_subjects():
        cells = [(line.label_of(subject.name), line.result_of(subject.name)) for line in shown]
        write_subject_sheet(subject, cells, out)


def left_out(before: Experiment, now: Experiment) -> list[str]:
    """What one comparison has and another lacks, in words.

    before: the settings that a report was made with. now: the settings of the next one.
    """
    lost = [
        f"{title} {name}"
        for title, field in (("subject", "subjects"), ("method", "methods"), ("budget", "budgets"))
        for name in getattr(before, field)
        if name not in getattr(now, field)
    ]
    lost += [
        f"{method} at the size {budget}"
        for method in now.methods
        if method in before.methods
        for budget in budgets_of(method, before)
        if budget in now.budgets and budget not in budgets_of(method, now)
    ]
    lost += [f"{title}'s learning rate {rate:g}" for title, rate in _lost_rates(before, now)]
    for field, title in (("seeds", "seeds"), ("sweep_subjects", "subjects in its sweep")):
        if getattr(before, field) > getattr(now, field):
            lost.append(f"{getattr(before, field)} {title}")
    return lost


def _lost_rates(before: Experiment, now: Experiment) -> list[tuple[str, float]]:
    """Learning rates of methods at sizes that both have, which only `before` tries."""
    lost = [
        (f"{method} {budget}" if budget and now.grid else method, rate)
        for method in now.methods
        if method in before.methods
        for budget in budgets_of(method, now)
        if budget in budgets_of(method, before)
        for rate in before.rates_of(method, budget)
        if rate not in now.rates_of(method, budget)
    ]
    return list(dict.fromkeys(lost))  # without a grid all sizes have the same


def plan(experiment: Experiment, out: Path, workers: int, earlier: Path | None = None) -> str:
    """What `run_benchmark` would do: methods with their sizes, cells, time, disk. Loads no weights but the base's.

    experiment: the settings. out: the folder, of which cells that are done are left out of the time. workers: cells at
    a time. earlier: folder of a finished comparison, whose spread says which difference this one can detect; without
    it, the settings say. Raises UserError if subjects or prompts cannot be read.
    """
    phases = {"base model and photos": base_cells(experiment)}
    if experiment.grid:
        phases["grid"] = grid_cells(experiment)
    else:
        rates = {method: getattr(experiment.learning_rates, method)[0] for method in experiment.methods}
        phases["learning rates"] = sweep_cells(experiment)
        phases["comparison"] = main_cells(experiment, rates)
    subjects = experiment.chosen_subjects()
    lines = [f"{len(subjects)} subjects: {', '.join(f'{s.name} ({s.class_word})' for s in subjects)}"]
    resolution = experiment.resolution
    try:
        models = load_model(experiment.pretrained_model_name_or_path)
    except UserError as error:  # a plan can be made where the model is not
        lines.append(f"sizes are listed where the base model is: {error}")
    else:
        lines += _sizes(experiment, models)
        resolution = resolution or models.resolution
    prompts = prompts_for(subjects[0], experiment.unique_token, experiment.prompts, experiment.max_prompts)
    pictures = sum(pictures_of(experiment, prompt.kind) for prompt in prompts)
    resolution = resolution or 512
    lines.append(
        f"each cell: {experiment.max_train_steps} steps at batch {experiment.train_batch_size}, "
        f"then {pictures} pictures of {resolution} px for {len(prompts)} prompts"
    )
    seconds, bytes_, lines_bytes = 0.0, 0.0, 0.0
    done = all_results(out)
    measured = mean_seconds(done)
    counted: set[Cell] = set()  # in earlier phases: the comparison takes over the sweep's cells
    for name, cells in phases.items():
        new = [cell for cell in cells if cell not in counted]
        counted.update(cells)
        missing = [cell for cell in new if cell not in done]
        each = [_seconds(experiment, cell, pictures, measured) for cell in missing]
        seconds += sum(each)
        kept = sum(pictures * (scorings(experiment, c) if experiment.grid else 1) for c in missing)
        bytes_ += kept * resolution**2 * BYTES_A_PIXEL
        lines_bytes += sum(pictures * (BYTES_A_ROW + BYTES_A_COLUMN * (scorings(experiment, c) - 1)) for c in new)
        known = f", {len(cells) - len(new)} of them counted above" if len(new) < len(cells) else ""
        lines.append(f"{name}: {len(cells)} cells{known}, {len(new) - len(missing)} done, {_hours(sum(each))} of work")
        lines += [f"    {cell.id}" for cell in cells if cell.seed == 0 and cell.subject == subjects[0].name]
        lines.append(f"    … and the same for every other subject and seed, {len(cells)} in all")
    source = "measured" if measured else "guessed from seconds_per_step and seconds_per_picture"
    lines.append(
        f"in all {_hours(seconds / workers)} with {workers} workers ({source}), {bytes_ / 1e9:.2f} GB of pictures, "
        f"about {lines_bytes / 1e6:.0f} MB of results.jsonl"
    )
    lines.append(_detectable(experiment, len(subjects), earlier))
    return "\n".join(lines)


def _detectable(experiment: Experiment, subjects: int, earlier: Path | None) -> str:
    """Which difference between two methods the comparison can detect."""
    deviation = spread_of_differences(earlier, experiment.grid) if earlier else experiment.difference_sd
    least = detectable_difference(deviation, subjects, experiment.seeds)
    if least is None:
        return "detectable difference: none, since one subject or one seed says nothing of how scores spread"
    source = f"as in {earlier}" if earlier else "as difference_sd says"
    if earlier and experiment.grid and (reach := reach_of_intervals(earlier)):
        half, before = reach
        least = detectable_by(half_width_of_more(half, before, subjects), subjects)
        source += f"; by its intervals, which reach {half:.3f} to either side with {before} subjects"
    return (
        f"detectable difference in {'lead' if experiment.grid else 'balance'}: {least:.3f} ({POWER:.0%} power at 5 %, "
        f"two-sided, {subjects} subjects, {experiment.seeds} seeds; standard deviation of differences over subjects "
        f"{deviation:.3f}, {source})"
    )


def _sizes(experiment: Experiment, models: BaseModel) -> list[str]:
    """Every method at every budget, and what it trains."""
    layers = adapted_layers(models.denoiser, models.text_encoders, experiment.text_encoder)
    full = count_parameters(BaselineConfig("full"), layers) or 0
    lines = [f"{len(layers)} layers are adapted, {full:,} numbers"]
    for budget in experiment.budgets:
        for method in experiment.methods:
            if budget not in budgets_of(method, experiment):
                continue
            text_encoder = adapts_text_encoder(method, experiment.text_encoder)
            own = adapted_layers(models.denoiser, models.text_encoders, text_encoder)
            config = matched(method, budget, layers, text_encoder, experiment.output_scale)
            count = count_parameters(config, own) or 0
            lines.append(f"    {budget:7} {TITLES[method]:30} {describe(config):12} {count:>12,} ({count / full:.1%})")
    return lines


def mean_seconds(results: Results) -> dict[str, float]:
    """Mean seconds of the cells that are done, by method."""
    seconds: dict[str, list[float]] = {}
    for cell, result in results.items():
        if "scores" in result:
            parts = ("prepare_seconds", "train_seconds", "pictures_seconds")  # all that results of before have
            taken = result.get("seconds") or sum(result.get(part, 0) for part in parts)
            seconds.setdefault(cell.method, []).append(taken)
    return {method: sum(values) / len(values) for method, values in seconds.items()}


def _seconds(experiment: Experiment, cell: Cell, pictures: int, measured: dict[str, float]) -> float:
    if cell.method in measured:
        return measured[cell.method]
    drawn = pictures * scorings(experiment, cell)
    steps = 0 if cell.method == "base" else experiment.max_train_steps
    return steps * experiment.seconds_per_step + drawn * experiment.seconds_per_picture


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


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
