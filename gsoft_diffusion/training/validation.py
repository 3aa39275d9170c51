"""Validation pictures: what the adapter draws during training and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product, takewhile
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from gsoft.whole_file import whole_file
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import sheet_of
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.folder import Photo
from gsoft_diffusion.sampling.generation import generate, sheet_rows
from gsoft_diffusion.sampling.pictures import contact_sheets
from gsoft_diffusion.training.signals import StopRequest
from gsoft_diffusion.training.state import TrainingState
from gsoft_diffusion.training.tracking import Tracking
from gsoft_diffusion.training.validation_scores import ValidationScores


class Validation:
    """Draws the validation prompts, as one labelled picture, `validation/step-<step>.png`, or several.

    With `score_validation` it also keeps every picture in `validation/step-<step>/`, with their scores.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        model: BaseModel,
        state: TrainingState,
        tracking: Tracking,
        instance: Sequence[Photo] = (),
    ) -> None:
        """config: names the prompts, how many pictures of each, and the sampler.
        accelerator: says which process draws.
        model: the base model, which the adapter is in.
        state: the run's; pictures are drawn with its adapter as in inference.
        tracking: is given the sheets.
        instance: the subject's photos, which pictures are compared with.

        Raises UserError if scores are asked for and cannot be made of these photos.
        """
        self.config, self.accelerator, self.model = config, accelerator, model
        self.state, self.tracking = state, tracking
        self.folder = Path(config.output_dir or ".")
        seeds = range(config.seed, config.seed + config.num_validation_images)
        self.jobs = list(product(config.validation_prompts or (), seeds))
        self.scores = (
            ValidationScores(config, model, instance, self.jobs, self.folder)
            if config.score_validation and accelerator.is_main_process and self.jobs
            else None
        )

    def draw_base(self, stop: StopRequest) -> None:
        """Draw the prompts with the base model, if pictures are compared with it and a run has not done so before.

        The adapter must be as at its start, when it changes nothing. stop: as in `draw`.
        """
        if self.scores and not sheet_of(self.folder, 0).exists():
            self.draw_here(stop)
        self.accelerator.wait_for_everyone()

    def draw(self, stop: StopRequest) -> None:
        """Draw and write the pictures in the main process; the others wait.

        stop: a request to stop does not wait for the pictures; they are left out then. Raises UserError if a sheet
        cannot be written.
        """
        if self.accelerator.is_main_process:
            self.draw_here(stop)
        self.accelerator.wait_for_everyone()

    def draw_here(self, stop: StopRequest) -> None:
        """Draw in this process, whatever the others do. stop, errors: as in `draw`."""
        config, step = self.config, self.state.step
        if not self.jobs:
            return
        with self.state.evaluated():
            samples = generate(
                self.model,
                self.jobs,
                config.sampler,
                resolution=config.resolution,
                batch_size=config.sample_batch_size,
            )
            drawn = list(takewhile(lambda _: not stop.requested, samples))
        if len(drawn) < len(self.jobs):
            return
        if self.scores:
            self.tracking.log(self.scores.write(drawn, step), step)
        rows = sheet_rows({"adapter": drawn}, config.num_validation_images)
        title = f"step {step}" if step else "step 0: the base model"
        for number, sheet in enumerate(contact_sheets(rows, title), start=1):
            self._write(sheet, number)

    def is_drawn(self) -> bool:
        """Whether the sheet of this step is there."""
        return sheet_of(self.folder, self.state.step).exists()

    def _write(self, sheet: Image.Image, number: int) -> None:
        path = sheet_of(self.folder, self.state.step, number)
        try:
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as file:
                sheet.save(file, "PNG")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; checkpoints are intact") from error
        self.tracking.log_sheet(sheet, number, self.state.step)
