"""Validation pictures: what the adapter draws during training and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import product, takewhile
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from gsoft.whole_file import whole_file
from gsoft_diffusion.config import Concept, TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import sheet_of
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.folder import Photo
from gsoft_diffusion.sampling.contact_sheets import contact_sheets, sheet_rows
from gsoft_diffusion.sampling.generation import Sample, generate
from gsoft_diffusion.training.best import no_longer_improves
from gsoft_diffusion.training.curve import write_curve
from gsoft_diffusion.training.signals import StopRequest
from gsoft_diffusion.training.state import TrainingState
from gsoft_diffusion.training.tracking import Tracking
from gsoft_diffusion.training.validation_scores import ValidationScores, read_scores


def validation_scores(
    config: TrainingConfig, accelerator: Accelerator, model: BaseModel, instance: Mapping[Concept, Sequence[Photo]]
) -> ValidationScores | None:
    """What scores a run's validation pictures; None if that is not asked for, or is another process's.

    config: the run's settings.
    accelerator: says which process scores.
    model: the base model.
    instance: each subject's photos, which pictures are compared with.

    Raises UserError if scores cannot be made of these photos.
    """
    jobs = _jobs(config)
    if not (config.scores_validation and accelerator.is_main_process and jobs):
        return None
    return ValidationScores(config, model, instance, jobs, Path(config.output_dir or "."))


def _jobs(config: TrainingConfig) -> list[tuple[str, int]]:
    """Prompt and seed of each of a step's pictures."""
    seeds = range(config.seed, config.seed + config.num_validation_images)
    return list(product(config.validation_prompts or (), seeds))


class Validation:
    """Draws the validation prompts, as one labelled picture, `validation/step-<step>.png`, or several.

    With `score_validation` it also keeps every picture in `validation/step-<step>/`, with their scores. Of scores and
    validation losses it draws the curve of all steps. With `--keep best` it has the state keep the best step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        model: BaseModel,
        state: TrainingState,
        tracking: Tracking,
        scores: ValidationScores | None,
    ) -> None:
        """config: names the prompts, how many pictures of each, and the sampler.
        accelerator: says which process draws.
        model: the base model, which the adapter is in.
        state: the run's; pictures are drawn with its adapter as in inference.
        tracking: is given the sheets.
        scores: scores the pictures, as `validation_scores` gave it.
        """
        self.config, self.accelerator, self.model = config, accelerator, model
        self.state, self.tracking, self.scores = state, tracking, scores
        self.folder = Path(config.output_dir or ".")
        self.jobs = _jobs(config)

    def resumed_from(self, checkpoint: Path) -> None:
        """Raise UserError if the best step of the run so far was judged otherwise than those to come would be.

        checkpoint: its folder, for the message. With `accept_changes` that step is forgotten instead.
        """
        best = self.state.best
        if best and self.scores and best.judged_by != self.scores.judged_by:
            if not self.config.accept_changes:
                raise UserError(
                    f"cannot resume {checkpoint}: its best step, {best.step}, was judged by other pictures or encoders "
                    "(--validation_prompts, --num_validation_images); put them back, or give --accept_changes, to "
                    "choose among later steps"
                )
            self.state.best = None

    def draw_base(self, stop: StopRequest) -> None:
        """Draw the prompts with the base model, if pictures are compared with it and that was not done before.

        stop: as in `draw`.
        """
        if self.scores and not self.scores.base_is_known:
            self._draw(0, stop)
        self.accelerator.wait_for_everyone()

    def draw(self, stop: StopRequest) -> bool:
        """Draw and write the pictures in the main process; the others wait. Returns whether all was drawn.

        stop: a request to stop does not wait for the pictures; they are left out then. Raises UserError if a sheet
        cannot be written.
        """
        drawn = self._any_process(self.accelerator.is_main_process and self.draw_here(stop))
        if drawn:
            self.state.was_judged()
        return drawn

    def draw_here(self, stop: StopRequest) -> bool:
        """Draw in this process, whatever the others do; returns whether all was drawn. stop, errors: as in `draw`."""
        drawn = self._draw(self.state.step, stop)
        if self.config.scores_validation or self.config.validation_loss:
            write_curve(self.folder, self.state.step, self.state.best.step if self.state.best else None)
        return drawn

    def is_owed(self) -> bool:
        """Whether this step's pictures are due and, as the run was stopped or killed before, have not been drawn; all
        processes must ask, and agree.

        Those of the last step come after the result is saved. With `--keep best` they may be in the folder: what counts
        is whether the state knows how good they are.
        """
        config, state = self.config, self.state
        every = config.validation_steps if self.jobs and state.step != config.max_train_steps else 0
        if not (every and state.step and state.step % every == 0):
            return False
        return state.judged != state.step if config.keep == "best" else not self.is_drawn()

    def is_over(self) -> bool:
        """Whether the run ends here, as its subject improves no longer; all processes must ask, and agree."""
        state = self.state
        here = self.accelerator.is_main_process and no_longer_improves(self.config, state.best, state.failed)
        return self._any_process(here)

    def _any_process(self, here: bool) -> bool:
        return bool(self.accelerator.gather(torch.tensor([here], device=self.accelerator.device)).any())

    def _draw(self, step: int, stop: StopRequest) -> bool:
        config = self.config
        if not self.jobs:
            return True
        with self.state.evaluated(), nullcontext() if step else self.state.adapter.disabled():
            samples = generate(
                self.model,
                self.jobs,
                config.sampler,
                resolution=config.resolution,
                batch_size=config.sample_batch_size,
            )
            drawn = list(takewhile(lambda _: not stop.requested, samples))
        if len(drawn) < len(self.jobs):
            return False
        if self.scores:
            self._score(self.scores, drawn, step)
        rows = sheet_rows([("", drawn)], config.num_validation_images)
        title = f"step {step}" if step else "step 0: the base model"
        for number, sheet in enumerate(contact_sheets(rows, title), start=1):
            self._write(sheet, number, step)
        return True

    def _score(self, judge: ValidationScores, drawn: Sequence[Sample], step: int) -> None:
        scores = judge.write(drawn, step)
        self.tracking.log(scores, step)
        if self.config.keep == "best" and "balance" in scores:
            self.state.keep_if_best(scores["balance"], judge.judged_by)

    def is_drawn(self) -> bool:
        """Whether the main process has drawn this step's sheet, and scored it if asked to; all must ask, and agree."""
        step = self.state.step
        scored = self.scores is None or read_scores(self.folder, step) is not None
        here = self.accelerator.is_main_process and scored and sheet_of(self.folder, step).exists()
        return self._any_process(here)

    def _write(self, sheet: Image.Image, number: int, step: int) -> None:
        path = sheet_of(self.folder, step, number)
        try:
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as file:
                sheet.save(file, "PNG")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; checkpoints are intact") from error
        self.tracking.log_sheet(sheet, number, step)
