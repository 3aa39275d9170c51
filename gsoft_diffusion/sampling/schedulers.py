"""diffusers' schedulers: which of them fit a model, and drawing latents with one.

A scheduler fits if it has the model's noise schedule and, told what a perfect model would predict, arrives at the
picture. That is tried out: diffusers' own lists name some that leave noise or diverge, and not all that work.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from gsoft_diffusion.config import SamplerConfig
from gsoft_diffusion.config.defaults import GUIDANCE, MINIATURE_BELOW, MINIATURE_GUIDANCE
from gsoft_diffusion.config.sampler import guides
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.noise import prediction_target, scheduler_class

logger = logging.getLogger(__name__)

TRIAL_STEPS = 20
TRIAL_ERROR = 0.1  # mean; pictures have a standard deviation of 1


def with_model_sampler(model: BaseModel, sampler: SamplerConfig) -> SamplerConfig:
    """The sampler with what only the model decides filled in: scheduler and guidance.

    Warns of settings without effect on the model, and leaves them out: a model that guides itself has no negative
    prompt, and some were distilled to one guidance.

    model: the base model to draw with.
    sampler: settings of drawing; the scheduler and guidance that they name are kept if they have an effect.

    Raises UserError as `make_scheduler` does.
    """
    guidance = sampler.guidance_scale
    if model.guides_itself and sampler.negative_prompt:
        logger.warning("%s guides itself: the negative prompt has no effect", model.name)
        sampler = replace(sampler, negative_prompt="")
    if not model.takes_guidance:
        if guidance is not None and guides(guidance):
            logger.warning(
                "%s has been distilled to draw without guidance: the guidance scale has no effect", model.name
            )
        guidance = 1.0
    elif guidance is None:
        usual = MINIATURE_GUIDANCE if model.resolution < MINIATURE_BELOW else GUIDANCE
        guidance = usual if model.usual_guidance is None else model.usual_guidance
    return replace(sampler, scheduler=type(make_scheduler(model, sampler)).__name__, guidance_scale=guidance)


def make_scheduler(model: BaseModel, sampler: SamplerConfig, latent_shape: tuple[int, int, int] | None = None) -> Any:
    """A scheduler with the base model's noise schedule and way of predicting, and the sampler's steps set.

    model: the base model to draw with.
    sampler: names the scheduler, or leaves it to the model's own, and says the number of steps.
    latent_shape: (channels, height, width) of the latents to draw; by default those of the model's own pictures.

    Raises UserError with the schedulers that fit if the sampler's does not (the checkpoint's own is not questioned), or
    if it cannot have so many or so few steps.
    """
    base = model.scheduler
    kind = scheduler_class(sampler.scheduler) if sampler.scheduler else type(base)
    if kind is not type(base) and not fits(model, kind):
        names = ", ".join(each.__name__ for each in fitting(model))
        raise UserError(f"--scheduler {sampler.scheduler} does not fit {model.name}; these do: {names}")
    if sampler.num_inference_steps > base.config.num_train_timesteps:
        raise UserError(f"--num_inference_steps: at most {base.config.num_train_timesteps} for {model.name}")
    latent_shape = latent_shape or model.latent_shape(model.resolution)
    try:
        return model.make_scheduler(kind, sampler.num_inference_steps, latent_shape)
    except ValueError as error:  # some need a few steps more
        given = f"{kind.__name__} with --num_inference_steps {sampler.num_inference_steps}"
        raise UserError(f"{given}: {first_line(error)}") from error


def denoise(
    scheduler: Any,
    noise: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Latents (N, C, h, w) that the scheduler makes of noise.

    scheduler: one of diffusers', with its steps set, and its timesteps on the CPU: by a timestep a scheduler looks up
      numbers, for which it would wait for a GPU.
    noise: (N, C, h, w), standard normal; the latents have its dtype and device.
    predict: called as `predict(noisy_latents, timestep)` at each step, with a timestep () on the latents' device;
      returns the prediction in the latents' shape.
    generators: one for each sample, for what some schedulers draw on the way.
    """
    latents = noise * getattr(scheduler, "init_noise_sigma", 1)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": list(generators)} if takes_generator else {}
    for timestep, on_device in zip(scheduler.timesteps, scheduler.timesteps.to(latents.device), strict=True):
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(predict(scaled, on_device), timestep, latents, **options).prev_sample
    return latents


def fitting(model: BaseModel) -> list[type[SchedulerMixin]]:
    """All of diffusers' schedulers that fit the model, by name."""
    found = [getattr(diffusers, name) for name in sorted(dir(diffusers)) if name.endswith("Scheduler")]
    return [kind for kind in found if not hasattr(kind, "_backends") and fits(model, kind)]


def fits(model: BaseModel, kind: type[SchedulerMixin]) -> bool:
    """Whether pictures can be drawn with the model by schedulers of a class.

    model: only its noise schedule is tried, with a perfect prediction in the denoiser's place.
    kind: the class; whatever it raises means that it does not fit.
    """
    generator = torch.Generator().manual_seed(0)
    picture, noise = torch.randn(2, 1, 4, 8, 8, generator=generator).to(model.device)
    levels, none = model.noise_scheduler(), torch.zeros_like(picture)

    def perfect(noisy: Tensor, timestep: Tensor) -> Tensor:
        timesteps = torch.as_tensor(timestep).round().long().reshape(1)
        signal, sigma = levels.add_noise(picture, none, timesteps), levels.add_noise(none, none + 1, timesteps)
        return prediction_target(levels, picture, (noisy - signal) / sigma, timesteps)

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # of settings that a scheduler does not know
    try:
        scheduler = model.make_scheduler(kind, TRIAL_STEPS, model.latent_shape(model.resolution))
        error = (denoise(scheduler, noise, perfect, [generator]) - picture).abs().mean()
        return model.keeps_schedule(scheduler) and error.item() < TRIAL_ERROR
    except Exception:  # those for other models raise whatever it is that they do not find
        return False
    finally:
        diffusers_logging.set_verbosity(verbosity)
