"""The loss on photos under the same crops, noise and timesteps every time, so that steps compare with each other.

A training step's own loss depends mostly on which timesteps it has drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.noise import prediction_target
from gsoft_diffusion.photos.crops import Variant, nearest_size
from gsoft_diffusion.photos.folder import Photo
from gsoft_diffusion.training.dataset import HELD_OUT, DreamBoothDataset, generator_for
from gsoft_diffusion.training.losses import denoising_loss
from gsoft_diffusion.training.predictor import Predictor
from gsoft_diffusion.training.state import TrainingState

TIMESTEPS = 8  # for each photo, spread evenly over what training draws from


class ValidationLoss:
    """The mean squared error over photos and timesteps, of the adapter as it is in inference."""

    def __init__(
        self,
        config: TrainingConfig,
        model: BaseModel,
        state: TrainingState,
        predictor: Predictor,
        dataset: DreamBoothDataset,
        photos: Sequence[Photo],
    ) -> None:
        """config: the run's settings.
        model: the base model, which encodes the photos now.
        state: the run's, whose adapter is looked at.
        predictor: as the run made it, before it was prepared for several processes; it knows the photos' prompts.
        dataset: the run's, which says how photos are shown. They are cropped in the middle here.
        photos: one or more, trained on or not.
        """
        self.config, self.model, self.state, self.predictor = config, model, state, predictor
        self.noise_scheduler = model.noise_scheduler()
        count = self.noise_scheduler.config.num_train_timesteps
        self.timesteps = model.draw_timesteps((torch.arange(TIMESTEPS) * 2 + 1) * count // (2 * TIMESTEPS))
        with model.on_device(model.vae):  # once for all photos
            self._shown = [self._fixed(number, photo, dataset) for number, photo in enumerate(photos)]

    def _fixed(self, number: int, photo: Photo, dataset: DreamBoothDataset) -> dict[str, Tensor]:
        """A photo as it is shown every time, in main memory, with its latents, its noise and its prompt's number."""
        variant = Variant(nearest_size(photo.size, list(dataset.view_settings.sizes)))
        shown = dataset.picture(photo, variant)
        moments = self.model.encode_images(shown.pop("pixels")[None])
        no_noise = torch.zeros(1, *dataset.view_settings.sizes[variant.size], device=moments.device)
        latents = self.model.sample_latents(moments, no_noise).cpu()
        generator = generator_for(self.config.seed, HELD_OUT, number)  # no other random numbers have this key
        noise = torch.randn((TIMESTEPS, *latents.shape[1:]), generator=generator)
        return shown | {"latents": latents, "noise": noise, "prompt": self.predictor.number_of(photo.prompt)}

    @torch.no_grad()
    def __call__(self) -> float:
        """The loss of the adapter as of now."""
        device, size = self.model.device, self.config.train_batch_size
        losses = []
        with self.state.evaluated():
            for shown in self._shown:
                for timesteps, noise in zip(self.timesteps.split(size), shown["noise"].split(size), strict=True):
                    timesteps, noise = timesteps.to(device), noise.to(device)
                    latents = shown["latents"].to(device).expand_as(noise)
                    model_pred = self.predictor(
                        self.noise_scheduler.add_noise(latents, noise, timesteps),
                        timesteps,
                        shown["prompt"][None],  # prompts' numbers stay on the CPU, as in `Run.batches`
                        torch.zeros(len(noise), dtype=torch.long),
                        shown["view"].to(device).expand(len(noise), -1),
                    )
                    target = prediction_target(self.noise_scheduler, latents, noise, timesteps)
                    weights = shown["weights"].to(device) if "weights" in shown else None
                    losses.append(denoising_loss(model_pred, target, weights))
        return torch.cat(losses).mean().item()
