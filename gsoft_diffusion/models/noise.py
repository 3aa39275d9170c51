"""How models add noise, and what they predict: diffusers' schedulers by name, and the targets of training."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import SchedulerMixin
from torch import Tensor

from gsoft_diffusion.foundation.errors import UserError

DIFFUSION_PREDICTIONS = ("epsilon", "v_prediction", "sample")  # a `prediction_type` that goes with `alphas_cumprod`


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The diffusers scheduler of that name, such as DDIMScheduler.

    Raises UserError if there is none, or if it needs a library that is not installed.
    """
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if found and hasattr(found, "_backends"):  # what diffusers has instead of a class that it cannot import
        raise UserError(f"{name} needs {' and '.join(found._backends)}: install what is missing")
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise UserError(
            f"diffusers has no scheduler {name}; try --scheduler DDIMScheduler or DPMSolverMultistepScheduler"
        )
    return found


def predicts_velocity(scheduler: Any) -> bool:
    """Whether the model of this scheduler was trained to predict `v` (see `prediction_target`)."""
    return getattr(scheduler.config, "prediction_type", None) == "v_prediction"


def prediction_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model was trained to predict, by the scheduler's `prediction_type`: (B, C, h, w).

    With `x_t = α_t·x + σ_t·ε`: `ε` (epsilon), `x` (sample) or `v = α_t·ε − σ_t·x` (v_prediction). In flow matching,
    where α_t = 1 − σ_t, it is `ε − x` (flow_prediction).

    scheduler: the model's `noise_scheduler`.
    latents: `x`, (B, C, h, w), without noise.
    noise: `ε`, of the same shape.
    timesteps: (B,), the `t` of each sample.

    Raises UserError for a `prediction_type` that is none of these.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if predicts_velocity(scheduler):
        return scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return latents
    if prediction_type == "flow_prediction":
        return noise - latents
    raise UserError(
        f"the scheduler's prediction_type {prediction_type} is not epsilon, v_prediction, sample or flow_prediction"
    )
