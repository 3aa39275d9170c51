"""Validation pictures: what the adapter draws during training and at its end."""

from __future__ import annotations

from itertools import product, takewhile
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from gsoft.whole_file import whole_file
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import sheet_of
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.sampling.generation import generate, sheet_rows
from gsoft_diffusion.sampling.pictures import contact_sheets
from gsoft_diffusion.training.signals import StopRequest
from gsoft_diffusion.training.state import TrainingState
from gsoft_diffusion.training.tracking import Tracking


class Validation:
    """Draws the validation prompts, as one labelled picture, `validation/step-<step>.png`, or several."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        model: BaseModel,
        state: TrainingState,
        tracking: Tracking,
    ) -> None:
        """config: names the prompts, how many pictures of each, and the sampler.
        accelerator: says which process draws.
        model: the base model, which the adapter is in.
        state: the run's; pictures are drawn with its adapter as in inference.
        tracking: is given the sheets.
        """
        self.config, self.accelerator, self.model = config, accelerator, model
        self.state, self.tracking = state, tracking
        self.folder = Path(config.output_dir or ".")

    def draw(self, stop: StopRequest) -> None:
        """Draw and write the pictures in the main process; the others wait.

        stop: a request to stop does not wait for the pictures; they are left out then. Raises UserError if a sheet
        cannot be written.
        """
        config, accelerator = self.config, self.accelerator
        if config.num_validation_images and config.validation_prompts and accelerator.is_main_process:
            seeds = range(config.seed, config.seed + config.num_validation_images)
            jobs = list(product(config.validation_prompts, seeds))
            with self.state.evaluated():
                samples = generate(
                    self.model,
                    jobs,
                    config.sampler,
                    resolution=config.resolution,
                    batch_size=config.sample_batch_size,
                )
                drawn = list(takewhile(lambda _: not stop.requested, samples))
            if len(drawn) == len(jobs):
                rows = sheet_rows({"adapter": drawn}, len(seeds))
                for number, sheet in enumerate(contact_sheets(rows, f"step {self.state.step}"), start=1):
                    self._write(sheet, number)
        accelerator.wait_for_everyone()

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
