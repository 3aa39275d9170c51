"""What a run leaves in its output folder to be resumed from, and how it is found again.

    settings.yaml            the run's resolved settings
    checkpoint-<step>/
        adapter.safetensors  the adapter as of that step, ready for inference
        state.pt             parameters, optimizer, schedule, scaler, step
    adapter.safetensors      the result

Random numbers need no place in a checkpoint: those of step k are a function of the seed and k.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.errors import UserError, first_line
from gsoft_diffusion.settings import read_yaml

SETTINGS, ADAPTER, STATE = "settings.yaml", "adapter.safetensors", "state.pt"
# May change when a run is resumed: they decide how long it goes on and what it reports, not how it learns.
FREE_TO_CHANGE = {
    "resume_from_checkpoint",
    "output_dir",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
    "validation_prompts",
    "num_validation_images",
    "validation_steps",
    "sample_batch_size",
    "dataloader_num_workers",
}


def checkpoint_to_resume(config: TrainingConfig) -> Path | None:
    """The checkpoint that the settings ask to go on from, None for a new run. To be asked before anything is computed.

    Raises UserError if the output folder holds another run and this one does not resume it, or if there is nothing to
    resume.
    """
    folder = Path(config.output_dir or ".")
    if config.resume_from_checkpoint is None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder}: is a file")
        if checkpoints(folder) or (folder / SETTINGS).exists() or (folder / ADAPTER).exists():
            raise UserError(
                f"--output_dir {folder}: holds another run; go on with it by --config {folder / SETTINGS} "
                "--resume_from_checkpoint latest, or choose another folder"
            )
        return None
    if config.resume_from_checkpoint == "latest":
        found = checkpoints(folder)
        if not found:
            raise UserError(f"--resume_from_checkpoint latest: there is no checkpoint in {folder}")
        checkpoint = found[-1]
    else:
        checkpoint = Path(config.resume_from_checkpoint)
        if not (checkpoint / STATE).is_file():
            raise UserError(f"--resume_from_checkpoint {checkpoint}: is not the folder of a checkpoint")
    return checkpoint


def check_settings(config: TrainingConfig, checkpoint: Path) -> None:
    """Raise UserError if a setting that decides how the run learns has changed since the checkpoint was written."""
    path = checkpoint.parent / SETTINGS
    before, now = read_yaml(path), config.to_dict()
    names = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    if names:
        changed = ", ".join(f"{name} is {now[name]} and was {before.get(name)}" for name in names)
        raise UserError(f"cannot resume {checkpoint} with other settings than in {path}: {changed}")


def checkpoints(folder: Path) -> list[Path]:
    """The folder's complete checkpoints, oldest first."""
    steps = [(step_of(path), path) for path in folder.glob("checkpoint-*") if (path / STATE).is_file()]
    return [path for step, path in sorted(steps) if step >= 0]


def step_of(checkpoint: Path) -> int:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def write_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], save_adapter: Callable[[Path], None], limit: int | None
) -> Path:
    """Write `checkpoint-<step>` beside and rename it, then delete the oldest beyond `limit`."""
    target, unfinished = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.{os.getpid()}.tmp"
    try:
        unfinished.mkdir(parents=True)
        save_adapter(unfinished / ADAPTER)
        with (unfinished / STATE).open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():  # from before a resume at an earlier step
            shutil.rmtree(target)
        unfinished.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; earlier checkpoints are intact") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in checkpoints(folder)[: -limit if limit else 0]:
        shutil.rmtree(old)
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state in a checkpoint; tensors and plain values only are loaded. UserError if it is damaged."""
    try:
        return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows as whatever the reader stumbles over
        raise UserError(f"{checkpoint}: damaged ({first_line(error)}); resume from an earlier one") from error


def write_settings(config: TrainingConfig) -> Path:
    """Write the resolved settings so that `--config` takes them again."""
    folder = Path(config.output_dir or ".")
    unfinished = folder / f".{SETTINGS}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(config.to_yaml(), encoding="utf-8")
        unfinished.replace(folder / SETTINGS)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error
    return folder / SETTINGS
