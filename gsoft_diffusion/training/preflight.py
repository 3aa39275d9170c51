"""Whether a training step fits into memory, before the run starts, and which switches would make it fit."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.memory import free_memory, is_apart
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.frozen_storage import FLOAT8, number_count, stored_layers, stored_weights
from gsoft_diffusion.models.loading import DTYPES, best_device, load_architecture
from gsoft_diffusion.training.preparation import with_architecture_defaults
from gsoft_diffusion.training.step_memory import step_bytes
from gsoft_diffusion.training.trainable import TrainableAdapter

logger = logging.getLogger(__name__)

Changes = tuple[tuple[str, Any], ...]  # of settings: name and new value
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "schedulefree": 8}  # for each parameter that trains


def check_step(config: TrainingConfig, model: BaseModel, adapter: TrainableAdapter, device: torch.device) -> None:
    """Raise UserError if a training step takes more memory than there is, with the fewest switches that would help.

    config: the run's settings.
    model, adapter: the base model, on its devices, and what trains in it; they are not changed.
    device: on which the step would run.

    Counted are the base model's weights, what a step holds at a time (see `step_bytes`) and the optimizer's state: a
    lower bound, so that what is refused would not have run. What can be had is what is free and what the weights that
    are on the device already take. A base in four bits is not counted: bitsandbytes' parameters have no stand-ins.
    """
    if config.quantize_base not in (None, "float8"):
        return
    available = free_memory(device) + sum(
        tensor.nbytes
        for part in _networks(model)
        for tensor in (*part.parameters(), *stored_weights(part))
        if tensor.device.type == device.type
    )

    estimate = Estimate(config, model, adapter, device)
    try:
        plan = estimate.plan(available)
        if plan is not None and not plan.changes:
            return
        needs, least = estimate.needed(), estimate.least()
    except Exception as error:  # whatever a model does that takes numbers: no reason not to train it
        logger.warning("how much memory a training step takes could not be estimated: %s", first_line(error))
        return
    if plan:
        advice = f"{flags(plan.changes)} would make it {_gigabytes(plan.needed)}"
    elif least:
        advice = f"no switch is enough: with {flags(least.changes)} it still takes {_gigabytes(least.needed)}"
    else:
        advice = "no other switch saves memory; use a smaller --resolution"
    raise UserError(
        f"not enough memory for training: model and training step take at least {_gigabytes(needs)}, and there are "
        f"{_gigabytes(available)} on {device}; {advice}"
    )


@dataclass(frozen=True)
class Plan:
    """Changes of settings, as (name, new value), and the bytes that are needed with them, at least."""

    changes: Changes
    needed: int


class Estimate:
    """What a run needs of memory, with its settings and with those that would save some. What was asked is kept."""

    def __init__(
        self, config: TrainingConfig, model: BaseModel, adapter: TrainableAdapter, device: torch.device
    ) -> None:
        """config: the run's settings. model, adapter, device: as in `needed_bytes`."""
        self.config, self.model, self.adapter, self.device = config, model, adapter, device
        self._steps: dict[tuple[object, ...], int] = {}

    def needed(self, changes: Changes = ()) -> int:
        """Bytes with the settings changed like this. Raises as `needed_bytes`."""
        config = replace(self.config, **dict(changes))
        trained = sum(parameter.numel() for parameter in self.adapter.parameters())
        state = trained * OPTIMIZER_BYTES[config.optimizer]
        return _weights_bytes(config, self.model, self.adapter, self.device) + self._step(config) + state

    def _step(self, config: TrainingConfig) -> int:
        """As `step_bytes`, which takes seconds and does not ask how weights are stored."""
        model, batch_size = self.model, config.train_batch_size * (2 if config.with_prior_preservation else 1)
        asked = (batch_size, config.resolution, config.gradient_checkpointing, config.mixed_precision)
        if asked not in self._steps:
            self._steps[asked] = step_bytes(
                model,
                self.adapter,
                batch_size,
                model.latent_shape(config.resolution or model.resolution),
                trains_text=self.adapter.config.text_encoder,
                gradient_checkpointing=config.gradient_checkpointing,
                dtype=DTYPES[config.mixed_precision],
                device=self.device,
            )
        return self._steps[asked]

    def plan(self, available: int) -> Plan | None:
        """The fewest changes with which so many bytes are enough, None if nothing is. Raises as `needed_bytes`."""
        if self.needed() <= available:
            return Plan((), self.needed())
        least = self.least()
        if least is None or least.needed > available:
            return None
        plans = switches(self.config, self.device)
        return next((Plan(plan, self.needed(plan)) for plan in plans if self.needed(plan) <= available), None)

    def least(self) -> Plan | None:
        """All changes that save memory, None if there are none. Raises as `needed_bytes`."""
        plans = switches(self.config, self.device)
        return Plan(plans[-1], self.needed(plans[-1])) if plans else None


def estimate_for(config: TrainingConfig, device: torch.device | None = None) -> Estimate:
    """The estimate of a run with these settings, before any weights are loaded or fetched.

    config: the settings; what they leave open is filled in as in training.
    device: on which it would run, which this machine need not have; by default the one that it would choose.

    Raises UserError as `load_architecture`, and for settings that do not go with the model.
    """
    model = load_architecture(
        config.pretrained_model_name_or_path, revision=config.revision, base_config=config.base_config
    )
    config = with_architecture_defaults(config.resolved(), model)
    adapter = inject(config.adapter, model.denoiser, model.text_encoders)
    return Estimate(config, model, adapter, device or torch.device(best_device()))


def needed_bytes(config: TrainingConfig, model: BaseModel, adapter: TrainableAdapter, device: torch.device) -> int:
    """What weights, optimizer state and a training step with these settings take of the device, in bytes, at least.

    config: the settings, which count and not how the model was loaded.
    model, adapter: the base model and what trains in it; they are not changed.
    device: on which the step would run; on a CPU, nothing is saved by offloading.

    Raises as `step_bytes`.
    """
    return Estimate(config, model, adapter, device).needed()


def _weights_bytes(config: TrainingConfig, model: BaseModel, adapter: TrainableAdapter, device: torch.device) -> int:
    """Bytes of the device that the base model's weights take with these settings."""
    on_device = _networks(model)
    if config.cpu_offload and is_apart(device):
        on_device = [model.denoiser, *(model.text_encoders if adapter.config.text_encoder else [])]
    return sum(_weight_bytes(config, model, part, device) for part in on_device)


def _weight_bytes(config: TrainingConfig, model: BaseModel, part: nn.Module, device: torch.device) -> int:
    """Bytes of the device that a network's weights take with these settings; scales of rows, which are few, are not
    counted.
    """
    dtype = next(part.parameters()).dtype if part is model.vae else DTYPES[config.mixed_precision]
    stores = part is model.denoiser or (part in model.all_text_encoders() and part not in model.text_encoders)
    stored = (
        sum(layer.weight.numel() for layer in stored_layers(part, config.adapter.fused_attention).values())
        if stores
        else 0
    )
    others = (number_count(part) - stored) * dtype.itemsize
    if config.offload_layers and part is model.denoiser and is_apart(device):
        return others
    return others + stored * (FLOAT8 if config.quantize_base == "float8" else dtype).itemsize


def switches(config: TrainingConfig, device: torch.device) -> list[Changes]:
    """Changes of the settings that save memory and nearly keep what is learned, fewest first; the last saves most.

    config: the settings to change; what they already do to save memory is not offered again.
    device: on which the step would run.

    Returns the plans, each as (name, new value) of the settings that it changes; none if nothing is left to change.
    """
    size, batches = config.train_batch_size, config.gradient_accumulation_steps
    smaller = [count for count in range(size - 1, 0, -1) if size % count == 0]
    choices: list[list[Changes]] = [  # of as many changes, those further down come first
        [(("quantize_base", "float8"),)] if not config.quantize_base and device.type != "mps" else [],
        [(("offload_layers", True),)] if not config.offload_layers and is_apart(device) else [],
        [(("train_batch_size", count), ("gradient_accumulation_steps", batches * size // count)) for count in smaller],
        [(("mixed_precision", "bf16"),)] if config.mixed_precision == "no" else [],
        [(("cpu_offload", True),)] if not config.cpu_offload and is_apart(device) else [],
        [(("gradient_checkpointing", True),)] if not config.gradient_checkpointing else [],
    ]
    plans = sorted(product(*([(), *choice] for choice in choices)), key=lambda plan: sum(map(bool, plan)))
    return [sum(plan, ()) for plan in plans if any(plan)]


def _networks(model: BaseModel) -> list[nn.Module]:
    return [part for name in model.parts() if isinstance(part := getattr(model, name), nn.Module)]


def flags(changes: Changes) -> str:
    """The changes as they are given on a command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changes)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
