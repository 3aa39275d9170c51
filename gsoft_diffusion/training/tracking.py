"""Trackers, to which a run reports its numbers and pictures: TensorBoard and the others that accelerate knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError, first_line


def wanted_trackers(config: TrainingConfig) -> list[str]:
    """The names in `report_to`, none for "none". Raises UserError for one that accelerate does not know."""
    names = [name.strip().lower() for name in config.report_to.split(",") if name.strip()]
    if "none" in names and len(names) > 1:
        raise UserError(f"--report_to {config.report_to}: names none and trackers; give one or the other")
    known = LoggerType.list()
    for name in names or [config.report_to]:
        if name not in (*known, "none"):
            raise UserError(f"--report_to {config.report_to}: {name} is no tracker; known: {', '.join(known)}, none")
    return [] if names == ["none"] else list(dict.fromkeys(names))


class Tracking:
    """What is reported to the trackers. A tracker that cannot write does not end the run."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator) -> None:
        """config: the settings that trackers are told. accelerator: whose trackers they are; prints notes."""
        self.config, self.accelerator = config, accelerator

    def start(self) -> None:
        """Tell them the settings."""
        self._track(lambda: self.accelerator.init_trackers("training", config=_flat(self.config.to_dict())))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Report numbers of a step.

        numbers: by the names that trackers show. step: optimizer steps done.
        """
        self._track(lambda: self.accelerator.log(dict(numbers), step=step))

    def log_sheet(self, sheet: Image.Image, number: int, step: int) -> None:
        """Report a contact sheet to those trackers that take pictures.

        sheet: the picture. number: which of the step's sheets, from 1. step: optimizer steps done.
        """

        def log_images() -> None:
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    name = "validation" if number == 1 else f"validation_{number}"
                    tracker.log_images({name: np.asarray(sheet)[None]}, step=step, **options)

        self._track(log_images)

    def _track(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:  # of a disk, of a service, of a login that was not made
            self.accelerator.trackers = []
            why = first_line(error)
            self.accelerator.print(
                f"note: {self.config.report_to} cannot write ({why}); nothing more is reported to it"
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Settings as trackers take them: one level, plain values."""
    flat: dict[str, int | float | str | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
