"""The optimizer and its learning rate schedule."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.training.trainable import TrainableAdapter

NOT_ZERO_AT_REST = ("output_scale", "magnitude")  # how names of such parameters end


def make_optimizer(config: TrainingConfig, adapter: TrainableAdapter) -> torch.optim.Optimizer:
    """The optimizer over the adapter's parameters.

    config: names the optimizer, its learning rates and other numbers; nothing may be left open.
    adapter: what trains. Weight decay leaves alone what is not 0 at rest: output scales, and the magnitudes of DoRA.
    Parameters in text encoders have a learning rate of their own.

    Raises UserError with the name of the package if the optimizer's library is missing.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in adapter.named_parameters():
        in_text_encoder, is_scale = name.startswith("text_encoder"), name.endswith(NOT_ZERO_AT_REST)
        rate = config.text_encoder_lr if in_text_encoder else config.learning_rate
        decay = 0.0 if is_scale else config.adam_weight_decay
        group = groups.setdefault((in_text_encoder, is_scale), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    module, name = {
        "adamw": ("torch.optim", "AdamW"),
        "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
        "prodigy": ("prodigyopt", "Prodigy"),
        "schedulefree": ("schedulefree", "AdamWScheduleFree"),
    }[config.optimizer]
    try:
        optimizer_class = getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"--optimizer {config.optimizer} needs a library: pip install {package}") from error
    options: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "schedulefree":
        options["warmup_steps"] = config.lr_warmup_steps
    if config.optimizer == "adamw":
        # Hundreds of small tensors in one call, which leaves out a step by itself where fp16's gradients overflowed:
        # PyTorch's other ways wait for the GPU to tell.
        options["fused"] = True
    assert config.learning_rate is not None, "with_model_defaults sets it"
    return optimizer_class(list(groups.values()), lr=config.learning_rate, **options)


def make_lr_scheduler(config: TrainingConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule of the learning rate, of PyTorch's `LambdaLR`; it counts optimizer steps.

    config: names the schedule and its numbers. optimizer: whose learning rates it sets.
    """
    assert config.max_train_steps is not None, "with_model_defaults sets it"
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
