"""From prompts and seeds to pictures: the one sampler that validation, class images and inference share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gsoft_diffusion.config import SamplerConfig
from gsoft_diffusion.config.sampler import guides
from gsoft_diffusion.models.families import BaseModel, Conditioning, joined, whole_view
from gsoft_diffusion.sampling.schedulers import denoise, make_scheduler, with_model_sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A generated picture and what it was made from."""

    prompt: str
    seed: int
    image: Image.Image


@torch.no_grad()
def generate(
    model: BaseModel,
    jobs: Sequence[tuple[str, int]],
    sampler: SamplerConfig,
    *,
    resolution: int | None = None,
    width: int | None = None,
    height: int | None = None,
    batch_size: int = 4,
) -> Iterator[Sample]:
    """Draw one picture for each job, in order.

    All noise of a picture comes from its own generator on the CPU, so a picture depends on the batch size and the
    device by rounding only. Pixels that are not finite make a black picture, and the first such a warning.

    model: the base model, with whatever adapter is in it.
    jobs: a prompt and a seed each.
    sampler: settings of drawing; what they leave open is the model's own (see `with_model_sampler`).
    resolution: side in pixels of square pictures; the model's own by default.
    width, height: sides of pictures that are not square; `resolution` where one is left out.
    batch_size: pictures that are drawn at once.

    Yields each picture once its batch is done. Raises UserError, with the first picture, if the model cannot draw such
    sides or does not go with the scheduler.
    """
    resolution = resolution or model.resolution
    width, height = width or resolution, height or resolution
    model.check_sides(resolution=resolution, width=width, height=height)
    sampler = with_model_sampler(model, sampler)
    scheduler = make_scheduler(model, sampler, model.latent_shape(width, height))
    guidance = sampler.guidance_scale
    assert guidance is not None, "with_model_sampler sets it"
    guided = guides(guidance) and not model.guides_itself
    with model.on_device(*model.all_text_encoders()):  # once for all prompts
        devices: dict[str, torch.device] = {}
        embeddings: dict[str, Conditioning] = {}  # in main memory: of large models each takes megabytes
        for prompt in sorted({prompt for prompt, _ in jobs}):
            encoded = model.encode_prompts([prompt])
            devices = {name: tensor.device for name, tensor in encoded.items()}
            embeddings[prompt] = {name: tensor.cpu() for name, tensor in encoded.items()}
        away = model.encode_negative(sampler.negative_prompt) if guided else None
    told = False
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        said = joined([embeddings[prompt] for prompt, _ in batch])
        positive = {name: tensor.to(devices[name]) for name, tensor in said.items()}
        negative = away and joined([away] * len(batch))
        # A copy, for a scheduler remembers the steps that it has taken.
        latents = _denoise(model, positive, negative, generators, deepcopy(scheduler), guidance, width, height)
        pixels = model.decode(latents)
        finite = pixels.isfinite().flatten(1).all(dim=1)
        if not (told or finite.all()):
            told = True
            advice = "; try --mixed_precision no" if model.dtype != torch.float32 else ""
            logger.warning("pixels are not finite: such pictures come out black%s", advice)
        pixels = pixels.where(finite[:, None, None, None], -1.0)
        for (prompt, seed), image in zip(batch, _to_images(pixels), strict=True):
            yield Sample(prompt, seed, image)


def _denoise(
    model: BaseModel,
    positive: Conditioning,
    negative: Conditioning | None,
    generators: list[torch.Generator],
    scheduler: Any,
    guidance: float,
    width: int,
    height: int,
) -> Tensor:
    """Latents (N, C, h, w) for the conditioning of N prompts, by the scheduler; guided if there is a negative."""
    latent_shape = model.latent_shape(width, height)
    noise = torch.stack([torch.randn(latent_shape, generator=generator) for generator in generators])
    conditioning = joined([negative, positive]) if negative else positive
    views = whole_view(width, height).to(model.device).repeat(len(noise) * (2 if negative else 1), 1)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        latents = torch.cat([latents, latents]) if negative else latents
        prediction = model.predict(latents, timestep, conditioning, views, guidance)
        if negative:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
        return prediction

    return denoise(scheduler, noise.to(model.device), predict, generators)  # float32 throughout


def _to_images(pixels: Tensor) -> list[Image.Image]:
    array = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]
