"""Which settings a comparison's folder takes, so that all of its cells compare and its report never shrinks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.cells import budgets_of
from eval.experiment import Experiment
from eval.prompts import prompts_for
from eval.results import PAGE_NAME, SETTINGS, Results, all_results
from eval.run_cell import photos_hash
from eval.subjects import Subject
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import whole_file
from gsoft_diffusion.models.loading import fetch_model
from gsoft_diffusion.scoring.encoders import load_encoders

FREE_TO_CHANGE = {  # they decide which cells there are and what is shown of them, not what is in one
    *("seeds", "subjects", "methods", "budgets", "medium_only", "learning_rates", "sweep_subjects", "sweep_budget"),
    *("learning_rates_small", "learning_rates_large"),
    "subjects_dir",  # the photos are compared themselves
    *("seconds_per_step", "seconds_per_picture", "difference_sd", "sheets"),
}


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
