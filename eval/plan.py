"""What a comparison would take: cells, sizes, time and disk, and which difference it can detect."""

from __future__ import annotations

from pathlib import Path

from eval.baselines import BaselineConfig, adapted_layers
from eval.cell_pictures import pictures_of
from eval.cells import Cell, base_cells, budgets_of, grid_cells, main_cells, scorings, sweep_cells
from eval.comparison_folder import settled
from eval.experiment import Experiment
from eval.methods import TITLES, adapts_text_encoder, count_parameters, describe, matched
from eval.prompts import prompts_for
from eval.report.intervals import POWER, detectable_by, detectable_difference, half_width_of_more
from eval.report.spread import reach_of_intervals, spread_of_differences
from eval.results import Results, all_results
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import load_model

BYTES_A_PIXEL = 1.6  # of generated pictures as PNG
BYTES_A_ROW, BYTES_A_COLUMN = 400, 50  # of results.jsonl for a picture: at the end of training, and before


def plan(experiment: Experiment, out: Path, workers: int, earlier: Path | None = None) -> str:
    """What `run_benchmark` would do: methods with their sizes, cells, time, disk. Loads no weights but the base's.

    experiment: the settings. out: the folder, of which cells that are done are left out of the time. workers: cells at
    a time. earlier: folder of a finished comparison, whose spread says which difference this one can detect; without
    it, the settings say. Raises UserError if subjects or prompts cannot be read, or if the folder would be refused.
    """
    experiment = settled(experiment, out)
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
