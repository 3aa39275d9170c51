"""Checkpoints in a run's output folder, and how a resumed run finds them.

    settings.yaml            the run's resolved settings
    checkpoint-<step>/
        adapter.safetensors  the adapter as of that step, ready for inference
        state.pt             parameters, optimizer, schedule, scaler, step, and what must not change
        SHA256SUMS           by which damage to the two is recognised; `sha256sum -c` reads it as well
    adapter.safetensors      the result

Random numbers need no place in a checkpoint: those of step k are a function of the seed and k.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch

from gsoft.fingerprint import OTHER_ARCHITECTURE, difference, how_far
from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.settings import Mark, marked
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.files import locked, sync_folder, whole_file
from gsoft_diffusion.foundation.model_names import lasting_name
from gsoft_diffusion.foundation.run_folder import (
    ADAPTER,
    CARD,
    CURVE,
    CURVE_TABLE,
    PROGRESS,
    SETTINGS,
    sheet_of,
    step_of,
)
from gsoft_diffusion.training.circumstances import BASE_WEIGHTS

STATE, SUMS = "state.pt", "SHA256SUMS"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")  # on which a run's numbers depend
MARK = b"# python "  # which settings that a run has written begin with
ELSEWHERE = "began from another run's checkpoint"  # in the same line, if it did
STEADY = ("constant", "constant_with_warmup")  # learning rate schedules that do not depend on how long the run is


@contextmanager
def output_folder(config: TrainingConfig) -> Iterator[None]:
    """Inside the block, hold an exclusive lock on the output folder, cleared of what a killed run left unfinished.

    Raises UserError if another run has it, it cannot be written, or it is the folder of photos or class images.
    """
    folder = Path(config.output_dir or ".")
    for concept in config.concepts:
        for given, what in (
            (concept.instance_data_dir, "a subject's photos"),
            (concept.class_data_dir, "class images"),
            (config.validation_data_dir, "held-out photos"),
        ):
            if given and Path(given).resolve() == folder.resolve():
                raise UserError(f"--output_dir {folder}: is the folder of {what}; choose another")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
            for path in folder.glob(".checkpoint-*.tmp"):  # left by a run that was killed
                shutil.rmtree(path)
            for name in (SETTINGS, ADAPTER, CARD):
                for path in folder.glob(f".{name}.*.tmp"):
                    path.unlink()
        except BlockingIOError as error:
            raise UserError(
                f"--output_dir {folder}: another run is writing to it ({error}); wait for it, or choose another folder"
            ) from error
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"--output_dir {folder}: is a file, or inside one") from error
        except OSError as error:
            raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error
        yield


def checkpoint_to_resume(config: TrainingConfig, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint from which the settings resume, None to begin with step 0. Call it before anything is computed.

    config: its `resume_from_checkpoint` is a checkpoint's folder or name, a run's folder, or `latest`: the newest that
    is sound; or the beginning, for a run that was killed before its first checkpoint.
    say: is told of newer ones that are damaged, and of the beginning.

    Raises UserError if there is nothing to resume, or if the output folder holds what would be written over.
    """
    folder = Path(config.output_dir or ".")
    if config.resume_from_checkpoint is None:
        _check_no_run(folder)
        return None
    wanted = config.resume_from_checkpoint
    given = Path(wanted).expanduser()
    if wanted == "latest":
        if _starts_again(folder):
            say(f"note: the run in {folder} ended before its first checkpoint; it starts from the beginning")
            return None
        return _newest_sound(folder, wanted, say)
    if (folder / given.name).is_dir() and given.name == wanted:  # a name in the output folder, as diffusers takes it
        given = folder / given
    checkpoint = _newest_sound(given, wanted, say) if checkpoints(given) else given
    if not (checkpoint.is_dir() and step_of(checkpoint) >= 0):
        there = [path.name for path in checkpoints(folder)]
        choice = f"; {folder} has {', '.join(there)}" if there else ""
        raise UserError(f"--resume_from_checkpoint {wanted}: is not the folder of a checkpoint{choice}")
    if damage := damage_of(checkpoint):
        raise UserError(f"--resume_from_checkpoint {wanted}: damaged ({damage}); resume from another, or latest")
    if checkpoint.resolve().parent != folder.resolve():
        _check_no_run(folder)
    elif later := [path.name for path in checkpoints(folder) if step_of(path) > step_of(checkpoint)]:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: resuming here would overwrite {', '.join(later)}; "
            "choose a new --output_dir, or delete them"
        )
    return checkpoint


def clear_beginning(folder: Path) -> None:
    """Delete what a run wrote that starts again: its progress and its validation. Raises UserError if that fails."""
    try:
        (folder / PROGRESS).unlink(missing_ok=True)
        for path in (*folder.glob("validation/step-*"), folder / CURVE, folder / CURVE_TABLE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error


def _newest_sound(folder: Path, wanted: str, say: Callable[[str], None]) -> Path:
    """The newest checkpoint in a run's folder that is sound; UserError, which names the option's value, without one."""
    damaged: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        damage = damage_of(checkpoint)
        if damage is None:
            for line in damaged:
                say(f"note: {line}; continuing from {checkpoint.name}, the newest sound one")
            return checkpoint
        damaged.append(f"{checkpoint} is damaged ({damage})")
    if damaged:
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint is sound; {'; '.join(damaged)}")
    raise UserError(
        f"--resume_from_checkpoint {wanted}: there is no checkpoint in {folder}; if the run was moved, give "
        "--output_dir as well; to start from the beginning, leave the option out"
    )


def _starts_again(folder: Path) -> bool:
    """Whether a run began in a folder, at step 0, and left no checkpoint and no result."""
    if checkpoints(folder) or (folder / ADAPTER).exists() or not (folder / SETTINGS).is_file():
        return False
    first, _, _ = (folder / SETTINGS).read_bytes().partition(b"\n")
    return first.startswith(MARK) and ELSEWHERE.encode() not in first


def _check_no_run(folder: Path) -> None:
    if checkpoints(folder):
        raise UserError(
            f"--output_dir {folder}: holds another run; to continue it, give --config {folder / SETTINGS} "
            "--resume_from_checkpoint latest, or choose another folder"
        )
    if (folder / ADAPTER).exists():
        raise UserError(f"--output_dir {folder}: holds another run's result, {ADAPTER}; choose another folder")
    if (folder / SETTINGS).exists() and any((folder / name).exists() for name in (PROGRESS, "validation")):
        again = f"to start it again, give --config {folder / SETTINGS} --resume_from_checkpoint latest"
        raise UserError(
            f"--output_dir {folder}: holds another run, which ended before its first checkpoint; "
            f"{again if _starts_again(folder) else 'delete the folder'}, or choose another"
        )
    if (folder / SETTINGS).exists() and not (folder / SETTINGS).read_bytes().startswith(MARK):
        raise UserError(
            f"--output_dir {folder}: has a {SETTINGS} of your own, which the run's would replace; move it, or choose "
            "another folder"
        )


def check_unchanged(
    config: TrainingConfig,
    checkpoint: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> None:
    """Raise UserError if a fact that decides the training has changed since the checkpoint was written.

    config: the settings of the run that resumes; with `accept_changes` what has changed is said, and no error.
    checkpoint: its folder, for the message.
    before, now: settings as `recorded`, or other facts by their names.
    say: is told of what is accepted; of another base model `RunOutputs.resumed_from` tells.
    """
    free = set(marked(TrainingConfig, Mark.FREE_TO_CHANGE)) - (
        {"max_train_steps"} if config.lr_scheduler not in STEADY else set()
    )
    changes = [f"{name} is new" for name in now if name not in before]
    changes += [f"{name} is gone" for name in before if name not in now]
    both = [name for name in now if name in before and name not in free and before[name] != now[name]]
    changes += [f"{name} is {now[name]} and was {before[name]}" for name in both if name != BASE_WEIGHTS]
    if config.accept_changes:
        if changes:
            say(f"note: {', '.join(changes)}: accepted")
        return
    if BASE_WEIGHTS in both:
        changes.append(f"the base model {other_base(before[BASE_WEIGHTS], now[BASE_WEIGHTS])}")
    if changes:
        raise UserError(f"cannot resume {checkpoint}: {', '.join(changes)}; put it back, or give --accept_changes")


def other_base(before: str, now: str) -> str:
    """What differs between two base models, in words that follow "the base model".

    before, now: their fingerprints, which are not equal.
    """
    found = difference(before, now)
    return f"has {found}" if found == OTHER_ARCHITECTURE else f"has other weights, {how_far(before, now)}"


def step_of_result(folder: Path) -> int:
    """How many steps the run had done that wrote the adapter in its folder, 0 if there is none that can be read."""
    try:
        return read_adapter(folder / ADAPTER).last_step or 0
    except UserError:
        return 0


def check_goes_further(config: TrainingConfig, step: int, over: bool = False) -> None:
    """Raise UserError if a run that goes on has nothing to do, or would replace the result by one of fewer steps.

    config: the run's settings, with `max_train_steps` filled in. step: of the checkpoint that it goes on from. over:
    whether the run had ended there, as its subject improved no longer.

    A run that was killed at its very end still has to write its result, so that is no reason to refuse it.
    """
    folder, steps = Path(config.output_dir or "."), config.max_train_steps
    assert steps is not None, "with_model_defaults sets it"
    result = step_of_result(folder)
    if result > steps:
        raise UserError(
            f"--max_train_steps {steps}: {folder / ADAPTER} was trained {result} steps and would be replaced by less; "
            f"give {result} or more, or another --output_dir"
        )
    end = step if over else steps
    complete = result == end and (folder / CARD).exists()
    if config.num_validation_images:
        complete = complete and sheet_of(folder, end).exists()
    if over and complete and not config.push_to_hub:
        raise UserError(
            f"--patience {config.patience}: the run ended at step {step}, as its subject improved no longer, so "
            "nothing is left to train; to train on, give more, or 0"
        )
    if step > steps or (step == steps and (complete or not checkpoints(folder)) and not config.push_to_hub):
        raise UserError(
            f"--max_train_steps {steps}: the checkpoint has {step} steps, so nothing is left to train; to train on, "
            f"give more than {step}"
        )


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, sound or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted((path for path in found if any(map(os.path.lexists, _files(path)))), key=step_of)


def _files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint; the checksums, which make it sound, come last."""
    return [checkpoint / name for name in (ADAPTER, STATE, SUMS)]


def damage_of(checkpoint: Path) -> str | None:
    """The damage of the checkpoint's files in words, None if they are as they were written."""
    try:
        lines = [line.split(maxsplit=1) for line in (checkpoint / SUMS).read_text(encoding="ascii").splitlines()]
        sums = {name: digest for digest, name in lines}
        for name in (STATE, ADAPTER):
            if sums.get(name) != _sha256(checkpoint / name):
                return f"{name} does not agree with {SUMS}"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except ValueError:
        return f"{SUMS} cannot be read"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], save_adapter: Callable[[Path], None], limit: int | None
) -> Path:
    """Write `checkpoint-<step>` under a temporary name, rename it, and keep only the newest `limit` sound ones.

    folder: the run's.
    step: optimizer steps done.
    state: tensors and plain values, as `read_state` gives them back.
    save_adapter: writes the adapter to the path that it is given.
    limit: how many checkpoints to keep; None or 0 for all.

    Returns the checkpoint's folder. Raises UserError if it cannot be written, or one beyond the limit not be deleted;
    earlier checkpoints are intact.
    """
    target, unfinished = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    try:
        unfinished.mkdir(parents=True)
        save_adapter(unfinished / ADAPTER)
        _save(state, unfinished / STATE)
        with whole_file(unfinished / SUMS) as file:
            file.write("".join(f"{_sha256(unfinished / name)}  {name}\n" for name in (ADAPTER, STATE)).encode())
        if target.exists():  # a damaged one: a run goes on from the newest that is sound
            _delete(target)
        if target.exists():  # it holds files of other making
            for path in _files(unfinished):
                path.replace(target / path.name)
            sync_folder(target)
        else:
            unfinished.replace(target)
        sync_folder(folder)
    except (OSError, UserError) as error:
        what = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"cannot write {target}: {what}; earlier checkpoints are intact") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if limit:
        _rotate(folder, limit)
    return target


class _Writer(BufferedWriter):
    """A file for `torch.save`, which swallows what goes wrong with it and raises a RuntimeError about positions."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _save(state: Mapping[str, Any], path: Path) -> None:
    with _Writer(path.open("wb", buffering=0)) as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:
            raise file.error or error from None
        file.flush()
        os.fsync(file.fileno())


def _rotate(folder: Path, limit: int) -> None:
    """Damaged checkpoints do not count, so that a sound one is always kept."""
    sound = 0
    for checkpoint in reversed(checkpoints(folder)):
        if sound == limit:
            try:
                _delete(checkpoint)
            except OSError as error:
                raise UserError(
                    f"cannot delete {checkpoint}, the oldest beyond --checkpoints_total_limit: {error.strerror}"
                ) from error
        elif damage_of(checkpoint) is None:
            sound += 1


def _delete(checkpoint: Path) -> None:
    """The checkpoint's own files, first the sums, without which the rest counts as damaged; and the folder, unless it
    holds what a run has not written.
    """
    for path in reversed(_files(checkpoint)):
        if path.is_dir() and not path.is_symlink():  # no checkpoint has one by such a name, so it is damage
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state in a sound checkpoint; tensors and plain values only are loaded. Raises UserError if that fails."""
    try:
        return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader stumbles over
        raise UserError(f"{checkpoint}: {STATE} cannot be loaded ({first_line(error)}); resume from another") from error


def recorded(config: TrainingConfig) -> TrainingConfig:
    """The settings as the run saves them: with absolute paths."""

    def absolute(path: str | None) -> str | None:
        return os.path.abspath(path) if path else path  # noqa: PTH100 - without `..`, with links

    def of_photos(settings: Any) -> Any:
        folders = {name: absolute(getattr(settings, name)) for name in ("instance_data_dir", "class_data_dir")}
        return replace(settings, **folders)

    return replace(
        of_photos(config),
        concepts_list=tuple(map(of_photos, config.concepts_list)),
        output_dir=absolute(config.output_dir),
        validation_data_dir=absolute(config.validation_data_dir),
        pretrained_model_name_or_path=lasting_name(config.pretrained_model_name_or_path),
        base_config=config.base_config and lasting_name(config.base_config),
    )


def write_settings(config: TrainingConfig, processes: int = 1, *, elsewhere: bool = False) -> Path:
    """Write the resolved settings so that `--config` takes them again; in a comment, what else a run depends on.

    config: the settings, whose `output_dir` is where they go. processes: how many train together. elsewhere: whether
    the run began from a checkpoint in another folder.

    Returns the file's path. Raises UserError if it cannot be written.
    """
    path = Path(config.output_dir or ".") / SETTINGS
    try:
        with whole_file(path) as file:
            used = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
            began = f"; {ELSEWHERE}" if elsewhere else ""
            file.write(MARK + f"{platform.python_version()}, {used}; processes: {processes}{began}\n".encode())
            file.write(recorded(config).to_yaml().encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path
