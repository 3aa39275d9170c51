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
from gsoft_diffusion.foundation.errors import DivergedError
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.noise import prediction_target
from gsoft_diffusion.training.checkpoints import checkpoints
from gsoft_diffusion.training.dataset import DROPOUT, derived_seed
from gsoft_diffusion.training.losses import add_offset, training_loss
from gsoft_diffusion.training.predictor import Predictor
from gsoft_diffusion.training.state import TrainingState


class TrainingStep:
    """The parts of a step, in their order: `backward` for each batch, `clip`, `agree`, `update`.

    It counts no steps itself. Only `agree` waits for the device, once; all else can be queued there meanwhile.
    """

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
        self._base: Predictor = accelerator.unwrap_model(state.predictor)  # which no other process waits for

    def backward(self, batch: dict[str, Tensor], number: int = 0) -> Tensor:
        """Run forward and backward pass for one batch of this process.

        batch: as `Run.batches` gives it. number: how many batches of this step came before. Returns its loss, a scalar
        without a graph.
        """
        place = self.state.step * self.config.gradient_accumulation_steps + number
        # All else has its own generators; this is for models with dropout.
        torch.manual_seed(derived_seed(self.config.seed, DROPOUT, place, self.accelerator.process_index))
        loss = self.loss(batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss, a scalar, of a batch as `Run.batches` gives it."""
        config, model, timesteps = self.config, self.model, batch["timestep"]
        moments = batch["moments"] if "moments" in batch else model.encode_images(batch["pixels"])
        latents = model.sample_latents(moments, batch["latent_noise"])
        noise = add_offset(batch["noise"], batch["offset"], config.offset_noise)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        target = prediction_target(self.noise_scheduler, latents, noise, timesteps)
        if config.predicts_prior:
            target = self._with_base_prediction(target, noisy_latents, batch)
        model_pred = self.state.predictor(noisy_latents, timesteps, batch["prompts"], batch["prompt_of"], batch["view"])
        return training_loss(
            model_pred,
            target,
            timesteps,
            batch["is_prior"],
            self.noise_scheduler,
            snr_gamma=config.snr_gamma,
            prior_loss_weight=config.prior_loss_weight,
            weights=batch.get("weights"),
        )

    @torch.no_grad()
    def _with_base_prediction(self, target: Tensor, noisy_latents: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The target with what the base model predicts, under the same noise, in place of the class's."""
        own = slice(1, None, 2)  # the class's samples, known without a look at `is_prior`, which a GPU would wait for
        with self.state.adapter.disabled():
            predicted = self._base(
                noisy_latents[own],
                batch["timestep"][own],
                batch["prompts"],
                batch["prompt_of"][own],
                batch["view"][own],
            )
        target = target.float().clone()
        target[own] = predicted
        return target

    def clip(self) -> Tensor:
        """Clip the gradients; returns their norm before that, a scalar on the device."""
        max_norm = self.config.max_grad_norm or math.inf
        return self.accelerator.clip_grad_norm_(self.state.adapter.parameters(), max_norm)

    def agree(self, losses: Sequence[Tensor], norm: Tensor, stop: bool) -> tuple[float, float, bool]:
        """Find the step's mean loss over all processes, the gradients' norm, and whether any was asked to stop.

        losses: scalars, one for each batch of this process since the last optimizer step.
        norm: what `clip` returned.
        stop: whether this process was asked to stop.

        A signal may reach one process alone, but if only one acted on it, the others would wait for it for ever.
        """
        known = self.accelerator.gather(torch.stack([*losses, norm, torch.full_like(norm, float(stop))]))
        known = known.view(self.accelerator.num_processes, -1).cpu()
        return known[:, :-2].mean().item(), known[:, -2].max().item(), bool(known[:, -1].any())

    def update(self, loss: float, norm: float) -> None:
        """Take the optimizer's step; where fp16's scaler skips it, count that in `state.skipped`.

        loss, norm: the step's, as `agree` gave them. Raises DivergedError if loss or gradient are not finite, which all
        processes find out alike.
        """
        state = self.state
        if not math.isfinite(loss):
            self._stop_at_bad_numbers("loss")
        if state.scaler is None and not math.isfinite(norm):
            self._stop_at_bad_numbers("gradient")
        state.optimizer.step()
        if not math.isfinite(norm):  # accelerate's `optimizer_step_was_skipped` is wrong with a fused optimizer
            state.skipped += 1
            if state.scaler.get_scale() < 1:  # it has tried everything
                self._stop_at_bad_numbers("gradient")
        else:
            state.lr_scheduler.step()
        state.optimizer.zero_grad()

    def _stop_at_bad_numbers(self, what: str) -> NoReturn:
        kept = [path.name for path in checkpoints(Path(self.config.output_dir or "."))]
        raise DivergedError(
            f"step {self.state.step + 1}: the {what} is not finite; {kept[-1] if kept else 'no checkpoint'} is kept "
            "from before. Lower --learning_rate, or use --mixed_precision bf16 or no"
        )
