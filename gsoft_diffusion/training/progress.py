"""The numbers of a run's steps in its folder, for programs that watch it: `progress.jsonl`, a line for each step.

{"step": 12, "loss": 0.1034, "lr": 0.001, "time": 1764112345.71}

Steps at which it was measured have a `validation_loss`, too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from gsoft_diffusion.foundation.run_folder import PROGRESS

RECENT = 50  # steps that decide how long the rest will take


@dataclass(frozen=True)
class StepNumbers:
    """What a run says of a step: how many are done, the step's loss and learning rate, and the time in seconds since
    1970; the validation loss where it was measured.
    """

    step: int
    loss: float
    lr: float
    time: float
    validation_loss: float | None = None


class Progress:
    """Writes the lines. A disk that takes no more does not end the run."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """folder: the run's. say: is told once if nothing can be written."""
        self.path, self.say = folder / PROGRESS, say
        self._written = True

    def write(self, step: int, loss: float, lr: float, validation_loss: float | None = None) -> None:
        """Add a step's line.

        step: optimizer steps done. loss, lr: the step's. validation_loss: None where it was not measured.
        """
        if self._written:
            try:
                with self.path.open("a+b") as file:
                    numbers = asdict(StepNumbers(step, loss, lr, time.time(), validation_loss))
                    known = {name: value for name, value in numbers.items() if value is not None}
                    cut = b"\n" if _ends_within_a_line(file) else b""  # as a killed run leaves it
                    file.write(cut + json.dumps(known).encode() + b"\n")
            except OSError as error:
                self._written = False
                self.say(f"note: cannot write {self.path} ({error.strerror}); nothing more is written to it")


def read_progress(folder: Path) -> list[StepNumbers]:
    """The steps that a run has done, in order. A run that was resumed has lost those after its checkpoint.

    folder: the run's. What is no whole line of numbers, as at the end of a killed run, is left out.
    """
    try:
        lines = (folder / PROGRESS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    done: list[StepNumbers] = []
    for numbers in filter(None, map(_numbers, lines)):
        while done and done[-1].step >= numbers.step:
            done.pop()
        done.append(numbers)
    return done


def seconds_left(steps: Sequence[StepNumbers], last: int) -> float | None:
    """How long the rest of a run will take at its latest pace, None if that is not known yet.

    steps: done, as `read_progress` gave them. last: the step at which the run ends.
    """
    pauses = [after.time - before.time for before, after in pairwise(steps[-RECENT - 1 :])]
    return median(pauses) * (last - steps[-1].step) if pauses else None


def _ends_within_a_line(file: BinaryIO) -> bool:
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _numbers(line: str) -> StepNumbers | None:
    try:
        values: Any = json.loads(line)
        known = {name: float(values[name]) for name in ("loss", "lr", "time")}
        if "validation_loss" in values:
            known["validation_loss"] = float(values["validation_loss"])
        numbers = StepNumbers(int(values["step"]), **known)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return numbers
