"""`torch.compile` for a model's networks: one graph each, whose operations are fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gsoft_diffusion.foundation.errors import UserError, first_line


def compile_networks(networks: Sequence[nn.Module], device: torch.device) -> None:
    """Have networks compiled when they are called for the first time, with each new shape of their inputs.

    networks: changed in place; their weights and names stay. device: where they are. Raises UserError, before anything
    is changed, if `torch.compile` cannot make code for the device.
    """
    try:
        torch.compile(_probe)(torch.ones(2, device=device))
    except Exception as error:  # whatever its many parts raise
        missing = "a C++ compiler, for example g++" if device.type == "cpu" else "Triton (pip install triton)"
        raise UserError(
            f"--compile: torch.compile cannot make code for {device.type} here; it needs {missing}. "
            f"Install it, or leave --compile out ({first_line(error)})"
        ) from error
    for network in networks:
        network.compile()


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x + 1) * x
