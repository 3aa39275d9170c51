"""Settings that accelerate's launcher passes by environment variables.

A setting that is not given takes the launcher's value; one that is given otherwise is refused, because either of the
two could be the mistake.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gsoft_diffusion.foundation.errors import UserError

PRECISIONS = ("no", "fp16", "bf16")
VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "attention_backend": "DIFFUSERS_ATTN_BACKEND",
    "device": "ACCELERATE_TORCH_DEVICE",
}
NOT_SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism_config",
}
RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def launched_settings() -> dict[str, Any]:
    """The settings for which the launcher has a value. Raises UserError for values that are not supported."""
    found: dict[str, Any] = {name: value for name, variable in VARIABLES.items() if (value := os.environ.get(variable))}
    precision = found.pop("mixed_precision", "no").lower()
    if precision not in PRECISIONS:
        raise UserError(f"{VARIABLES['mixed_precision']}={precision}: give the launcher one of {', '.join(PRECISIONS)}")
    if precision != "no":  # the launcher's word where nobody has chosen
        found["mixed_precision"] = precision
    if (steps := found.get("gradient_accumulation_steps")) is not None:
        if not (steps.isascii() and steps.isdigit() and int(steps)):
            raise UserError(f"{VARIABLES['gradient_accumulation_steps']}={steps}: must be a whole number above 0")
        found["gradient_accumulation_steps"] = int(steps)
    if _is_on("ACCELERATE_USE_CPU"):
        found["device"] = "cpu"
    return found


def check_launched(settings: Mapping[str, Any]) -> None:
    """Raise UserError if the launcher contradicts the settings, or asks for something that is not supported."""
    for variable, name in NOT_SUPPORTED.items():
        if _is_on(variable):
            raise UserError(f"{variable}: {name} is not supported, as adapters are small; launch without it")
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND={compiler}: launch without --dynamo_backend, and give --compile instead"
        )
    if os.environ.get("ACCELERATE_GRADIENT_CLIPPING"):
        raise UserError("ACCELERATE_GRADIENT_CLIPPING is DeepSpeed's; unset it, and give --max_grad_norm")
    for name, value in launched_settings().items():
        if settings.get(name, value) not in (value, None):
            variable = "ACCELERATE_USE_CPU" if name == "device" and _is_on("ACCELERATE_USE_CPU") else VARIABLES[name]
            raise UserError(
                f"--{name} {settings[name]}: {variable} says {value}, from the launcher or your shell; "
                "give only one of them, or the same"
            )


def process_count() -> int:
    """How many processes the launcher has started.

    Raises UserError if WORLD_SIZE says several and nothing says which of them this is: it would wait for the others.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not (count.isascii() and count.isdigit()):
        raise UserError(f"WORLD_SIZE={count}: must be a whole number; launchers set it, so unset it")
    if int(count) > 1 and not any(rank in os.environ for rank in RANKS):
        raise UserError(
            f"WORLD_SIZE={count}, but no launcher has started this process; unset it, or start by accelerate launch"
        )
    return int(count)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")
