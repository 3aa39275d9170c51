"""One training step: from a batch to its loss and gradients, and from those to the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.noise import prediction_target
from gsoft_diffusion.training.checkpoints import checkpoints
from gsoft_diffusion.training.dataset import DROPOUT, derived_seed
from gsoft_diffusion.training.losses import add_offset, training_loss
from gsoft_diffusion.training.state import TrainingState


class TrainingStep:
    """The parts of a step, in their order: `backward` for each batch, `agree`, `update`. It counts no steps itself."""

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, model: BaseModel, state: TrainingState
    ) -> None:
        """config: the run's settings, with nothing left open.
        accelerator: runs the backward pass and gathers what processes have to agree on.
        model: the base model, for encoding and noise.
        state: the predictor and all that a step changes.
        """
        self.config, self.accelerator, self.model, self.state = config, accelerator, model, state
        self.noise_scheduler = model.noise_scheduler()

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        """Run forward and backward pass for one batch of this process.

        batch: as `DreamBoothDataset` makes it, on the device. Returns its loss, a scalar without a graph.
        """
        # All else has its own generators; this is for models with dropout.
        torch.manual_seed(derived_seed(self.config.seed, DROPOUT, self.state.step, self.accelerator.process_index))
        loss = self.loss(batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss, a scalar, of a batch as `DreamBoothDataset` makes it, on the device."""
        config, model = self.config, self.model
        timesteps = model.draw_timesteps(batch["timestep"])
        moments = batch["moments"] if "moments" in batch else model.encode_images(batch["pixels"])
        latents = model.sample_latents(moments, batch["latent_noise"])
        noise = add_offset(batch["noise"], batch["offset"], config.offset_noise)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        model_pred = self.state.predictor(noisy_latents, timesteps, batch["prompt"], batch["view"])
        return training_loss(
            model_pred,
            prediction_target(self.noise_scheduler, latents, noise, timesteps),
            timesteps,
            batch["is_prior"],
            self.noise_scheduler,
            snr_gamma=config.snr_gamma,
            prior_loss_weight=config.prior_loss_weight,
            weights=batch.get("weights"),
        )

    def agree(self, losses: Sequence[Tensor], stop: bool) -> tuple[float, bool]:
        """Find the step's mean loss over all processes, and whether any of them was asked to stop.

        losses: scalars, one for each batch of this process since the last optimizer step.
        stop: whether this process was asked to stop.

        A signal may reach one process alone, but if only one acted on it, the others would wait for it for ever.
        """
        told = self.accelerator.gather(torch.stack([*losses, torch.full_like(losses[0], float(stop))]))
        told = told.view(self.accelerator.num_processes, -1)
        return told[:, :-1].mean().item(), bool(told[:, -1].any())

    def update(self, loss: float) -> None:
        """Clip the gradients and take the optimizer's step; where fp16's scaler skips it, count that in
        `state.skipped`.

        loss: the step's, as `agree` gave it. Raises UserError if loss or gradient are not finite, which all processes
        find out alike.
        """
        config, accelerator, state = self.config, self.accelerator, self.state
        if not math.isfinite(loss):
            self._stop_at_bad_numbers("loss")
        norm = accelerator.clip_grad_norm_(state.adapter.parameters(), config.max_grad_norm or math.inf)
        if state.scaler is None and not norm.isfinite():
            self._stop_at_bad_numbers("gradient")
        state.optimizer.step()
        if accelerator.optimizer_step_was_skipped:
            state.skipped += 1
            if state.scaler.get_scale() < 1:  # it has tried everything
                self._stop_at_bad_numbers("gradient")
        else:
            state.lr_scheduler.step()
        state.optimizer.zero_grad()

    def _stop_at_bad_numbers(self, what: str) -> NoReturn:
        kept = [path.name for path in checkpoints(Path(self.config.output_dir or "."))]
        raise UserError(
            f"step {self.state.step + 1}: the {what} is not finite; {kept[-1] if kept else 'no checkpoint'} is kept "
            "from before. Lower --learning_rate, or use --mixed_precision bf16 or no"
        )
