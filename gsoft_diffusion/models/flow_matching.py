"""Flow matching, what SD3 and FLUX learn, in the terms of diffusers' `DDPMScheduler`.

On the straight way from a picture to noise, `x_σ = (1 − σ)·x + σ·ε`, the model predicts the velocity `ε − x`. A
timestep is σ times the number of training timesteps. Source: Esser et al., *Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis* (arXiv 2403.03206).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class FlowMatching:
    """Adds noise; what `prediction_target` asks it for is in `config`."""

    def __init__(self, scheduler: Any) -> None:
        """scheduler: diffusers' for the model; its shift of the timesteps is kept."""
        steps = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.timesteps = steps.timesteps  # from noise to picture
        self.config = SimpleNamespace(
            num_train_timesteps=steps.config.num_train_timesteps, prediction_type="flow_prediction"
        )

    def draw(self, uniform: Tensor) -> Tensor:
        """Timesteps (B,), float32, for whole numbers drawn evenly below `num_train_timesteps`.

        They are taken for quantiles of the logit-normal distribution (location 0, scale 1): the middle of the way is
        drawn most. Source: Esser et al., §3.1; diffusers' training scripts index the shifted timesteps the same way.

        uniform: the whole numbers (B,); the timesteps are on their device.
        """
        count = self.config.num_train_timesteps
        place = torch.special.ndtri((uniform.double() + 0.5) / count).sigmoid()
        return self.timesteps.to(uniform.device)[(place * count).long()]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_σ` for each sample: (B, C, h, w), on the straight way from its latents to its noise.

        latents: `x`, (B, C, h, w), of pictures without noise.
        noise: `ε`, of the same shape.
        timesteps: (B,), σ times the number of training timesteps.
        """
        sigmas = (timesteps / self.config.num_train_timesteps)[:, None, None, None]
        return (1 - sigmas) * latents + sigmas * noise
