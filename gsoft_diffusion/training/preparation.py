"""Preparation before the first step: settings that only the model decides, how networks compute, and the data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gsoft_diffusion.adapters.injection import completed
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.defaults import FULL_SIZE, MINIATURE, MINIATURE_BELOW
from gsoft_diffusion.foundation.errors import UserError, first_line, printable
from gsoft_diffusion.models.compilation import compile_networks
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.crops import bucket_sizes
from gsoft_diffusion.photos.folder import Photo
from gsoft_diffusion.photos.preview import enlarged
from gsoft_diffusion.sampling.schedulers import with_model_sampler
from gsoft_diffusion.training.dataset import DreamBoothDataset, ViewSettings

logger = logging.getLogger(__name__)


def with_model_defaults(config: TrainingConfig, model: BaseModel) -> TrainingConfig:
    """The settings with what only the model decides filled in: size of the adapter, resolution, sampler, steps, rates.

    config: the resolved settings; what they say is kept, except that a text encoder that cannot be trained is left out
    with a warning. model: the base model. Raises UserError for a resolution that the model does not take.
    """
    config = with_architecture_defaults(config, model)
    return replace(config, sampler=with_model_sampler(model, config.sampler))


def with_architecture_defaults(config: TrainingConfig, model: BaseModel) -> TrainingConfig:
    """As `with_model_defaults`, but for the sampler, so that the model need not have its weights."""
    resolution = config.resolution or model.resolution
    model.check_sides(resolution=resolution)
    usual = MINIATURE if model.resolution < MINIATURE_BELOW else FULL_SIZE
    left_open: dict[str, Any] = {name: value for name, value in usual.items() if getattr(config, name) is None}
    if config.adapter.text_encoder and not model.text_encoders:
        logger.warning("the text encoder of %s cannot be trained: it stays as it is", model.title)
        config = replace(config, adapter=replace(config.adapter, text_encoder=False))
    if not config.adapter.text_encoder:
        left_open.pop("text_encoder_lr", None)
    elif config.optimizer == "prodigy":
        left_open["text_encoder_lr"] = config.learning_rate
    adapter = completed(config.adapter, model.denoiser, model.text_encoders)
    return replace(config, adapter=adapter, resolution=resolution, **left_open)


def set_up_networks(config: TrainingConfig, model: BaseModel) -> None:
    """Choose how the networks that train compute: backend of attention, recomputed activations, compiled graphs.

    config: says so in `attention_backend` (None leaves diffusers' choice), `gradient_checkpointing` and `compile`.
    model: the base model, changed in place. Raises UserError for a backend that is not known, not there or not taken by
    this model, and if there is nothing to compile with.
    """
    if config.attention_backend:
        try:
            model.denoiser.set_attention_backend(config.attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"--attention_backend {config.attention_backend}: {first_line(error)}") from error
        processors = [getattr(module, "processor", None) for module in model.denoiser.modules()]
        if not any(hasattr(processor, "_attention_backend") for processor in processors):  # diffusers passes over them
            raise UserError(
                f"--attention_backend {config.attention_backend}: does nothing with {model.title}; leave it out"
            )
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    if config.compile:
        text_encoders = model.text_encoders if config.adapter.text_encoder else []
        compile_networks([model.denoiser, *text_encoders], model.device)


def check_snr_gamma(config: TrainingConfig, model: BaseModel) -> None:
    """Raise UserError if min-SNR weights are asked for of a model that learns by flow matching.

    config: its `snr_gamma` asks for them. model: the base model.
    """
    if config.snr_gamma is not None and model.noise_scheduler().config.prediction_type == "flow_prediction":
        raise UserError(
            f"--snr_gamma: {model.name} learns by flow matching, which weights timesteps by drawing them; leave it out"
        )


def make_dataset(
    config: TrainingConfig,
    model: BaseModel,
    instance: Sequence[Photo],
    prior: Sequence[Photo],
    say: Callable[[str], None],
) -> DreamBoothDataset:
    """The data set of the subjects' photos and the class images.

    config: the run's settings.
    model: the base model, which decides the shapes of latents and the number of timesteps.
    instance, prior: the subjects' photos, and the class images or none.
    say: is told which sizes there are, which photos are too small for them, and if `center_crop` has no effect.
    """
    resolution = config.resolution or model.resolution
    sizes = bucket_sizes(resolution, model.size_step) if config.aspect_buckets else [(resolution, resolution)]
    view_settings = ViewSettings(
        {size: model.latent_shape(*size) for size in sizes},
        config.center_crop,
        config.random_flip,
        config.unmasked_weight,
    )
    dataset = DreamBoothDataset(
        instance,
        prior,
        view_settings,
        batch_size=config.train_batch_size,
        num_timesteps=model.noise_scheduler().config.num_train_timesteps,
        seed=config.seed,
    )
    if small := [photo.path.name for photo in instance if enlarged(photo, sizes)]:
        named = ", ".join(small[:3]) + (f" and {len(small) - 3} more" if len(small) > 3 else "")
        say(f"note: fewer pixels than the model's pictures, so enlarged and soft: {printable(named)}")
    if config.aspect_buckets:
        counts = (f"{width}×{height} ({len(photos)})" for (width, height), photos in dataset.by_size.items())
        say(f"sizes: {', '.join(counts)}")
    if config.center_crop and not dataset.crops:
        say("note: --center_crop has no effect: no photo needs to be cropped")
    return dataset
