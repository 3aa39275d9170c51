"""What a run's folder says of it: how far it is, its pictures and scores, its adapters, what was drawn and exported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.app.jobs import Job
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import ADAPTER, CARD, CURVE, PROGRESS, SETTINGS, pictures_of, step_of
from gsoft_diffusion.sampling.pictures import read_facts
from gsoft_diffusion.training.checkpoints import checkpoints
from gsoft_diffusion.training.progress import StepNumbers, read_progress, seconds_left
from gsoft_diffusion.training.validation_scores import StepScores, best_step, read_scores

PATIENCE = 180.0  # seconds of silence after which a run may be stuck
SLOW_STEPS = 20  # or so many times its usual step, if that is more
EXPORTS = r"(merged[\w-]*|(kohya|diffusers)_lora_rank[\w-]*|diff(_[\w-]*)?)"  # names of exports without their end
MERGED = r"merged[\w-]*"  # folders of whole models
PICTURE = re.compile(r"(\d+)_seed\d+_.*\.png")


@dataclass(frozen=True)
class Picture:
    """A picture in a run's folder. name: below the folder, with slashes. facts: how it was made, as its PNG says."""

    name: str
    facts: dict[str, Any]

    @property
    def prompt(self) -> str:
        """What it was asked to show."""
        return str(self.facts.get("prompt", ""))


@dataclass(frozen=True)
class Step:
    """The pictures of a step's validation, with their scores if they have some.

    step: 0 is the base model. sheets: the contact sheets, which those runs have, too, that keep no single pictures.
    """

    step: int
    pictures: tuple[Picture, ...]
    sheets: tuple[str, ...]
    scores: StepScores | None


class RunView:
    """A run's folder as it is now."""

    def __init__(self, folder: Path, job: Job | None = None) -> None:
        """folder: the run's. job: its latest training in the page's queue, if there is one."""
        self.folder, self.job = folder, job
        self.numbers: Sequence[StepNumbers] = read_progress(folder)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def settings(self) -> TrainingConfig | None:
        """The run's settings, None if it has not written any."""
        path = self.folder / SETTINGS
        try:
            return _settings(path, path.stat().st_mtime_ns)
        except (OSError, UserError):
            return None

    @property
    def step(self) -> int:
        """Steps done."""
        return self.numbers[-1].step if self.numbers else 0

    @property
    def last_step(self) -> int | None:
        """The step at which it ends, None if that is not known."""
        return self.settings.max_train_steps if self.settings else None

    @property
    def seconds_left(self) -> float | None:
        """How long it will still take, None if that is not known."""
        return seconds_left(self.numbers, self.last_step) if self.last_step and self.job_runs else None

    @property
    def job_runs(self) -> bool:
        """Whether its process is at work."""
        return self.job is not None and self.job.state == "running"

    @property
    def trains(self) -> bool:
        """Whether its process has come as far as a step since it was started."""
        if self.job is None or not self.job_runs or self.job.started is None or not self.numbers:
            return False
        return self.numbers[-1].time > self.job.started

    @property
    def silence(self) -> float | None:
        """Seconds for which it has said nothing, if these are so many that it may be stuck; else None."""
        if self.job is None or not self.job_runs:
            return None
        silent, recent = self.job.silent_for(self.folder / PROGRESS), self.numbers[-20:]
        usual = (recent[-1].time - recent[0].time) / (len(recent) - 1) if len(recent) > 1 else 0.0
        return silent if silent > max(PATIENCE, SLOW_STEPS * usual) else None

    @property
    def steps(self) -> list[Step]:
        """The validations in order, the base model's first if there is one."""
        validation = self.folder / "validation"
        found: dict[int, list[str]] = {}
        for path in sorted(validation.glob("step-*.png")):
            if match := re.fullmatch(r"step-(\d+)(_\d+)?\.png", path.name):
                found.setdefault(int(match[1]), []).append(f"validation/{path.name}")
        return [
            Step(step, self._pictures(pictures_of(self.folder, step)), tuple(sheets), read_scores(self.folder, step))
            for step, sheets in sorted(found.items())
        ]

    @property
    def best(self) -> int | None:
        """The step whose pictures have the best balance of likeness and prompt, None if it is not known."""
        return best_step([each.scores for each in self.steps if each.scores])

    @property
    def curve(self) -> tuple[str, int] | None:
        """The picture of its scores, and a number that changes with it; None if there is none."""
        path = self.folder / CURVE
        return (CURVE, path.stat().st_mtime_ns) if path.is_file() else None

    @property
    def adapters(self) -> dict[int, Path]:
        """Its adapters by step: the checkpoints', and the result."""
        found = {step_of(path): path / ADAPTER for path in checkpoints(self.folder) if (path / ADAPTER).is_file()}
        result = self.folder / ADAPTER
        if result.is_file():
            found[_step_of_adapter(result, result.stat().st_mtime_ns)] = result
        return dict(sorted(found.items()))

    @property
    def drawn(self) -> list[tuple[Picture, ...]]:
        """What was drawn with its adapters, in groups of one prompt and seed; the latest first."""
        places = [self.folder / "images", *sorted((self.folder / "images").glob("checkpoint-*"))]
        groups: dict[tuple[Path, str], list[tuple[int, Picture]]] = {}
        for place in places:
            for picture in self._pictures(place):
                path = self.folder / picture.name
                groups.setdefault((place, path.name.partition("_")[0]), []).append((path.stat().st_mtime_ns, picture))
        ordered = sorted(groups.values(), key=lambda group: max(time for time, _ in group), reverse=True)
        return [tuple(picture for _, picture in sorted(group, key=lambda each: each[0])) for group in ordered]

    @property
    def exports(self) -> list[str]:
        """What can be taken home: names of files and of folders below the run's, which end in a slash."""
        there = sorted(path for path in self.folder.glob("*") if not path.is_symlink())
        files = [path.name for path in there if re.fullmatch(rf"{EXPORTS}\.safetensors", path.name)]
        return files + [f"{path.name}/" for path in there if re.fullmatch(MERGED, path.name) and path.is_dir()]

    @property
    def card(self) -> str:
        """The model card without its front matter, "" if there is none."""
        try:
            text = (self.folder / CARD).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""
        return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)

    def _pictures(self, place: Path) -> tuple[Picture, ...]:
        paths = sorted(path for path in place.glob("*.png") if PICTURE.fullmatch(path.name) and not path.is_symlink())
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        return tuple(
            Picture(name, _facts(path, path.stat().st_mtime_ns)) for name, path in zip(names, paths, strict=True)
        )


@lru_cache(maxsize=64)
def _settings(path: Path, changed: int) -> TrainingConfig:
    return TrainingConfig.from_dict(read_yaml(path))


@lru_cache(maxsize=4096)
def _facts(path: Path, changed: int) -> dict[str, Any]:
    return read_facts(path)


@lru_cache(maxsize=256)
def _step_of_adapter(path: Path, changed: int) -> int:
    try:
        return read_adapter(path).step or 0
    except UserError:
        return 0
