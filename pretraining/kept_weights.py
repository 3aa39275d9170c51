"""Averaged weights of a training in progress, in half precision: small enough to be kept where a work folder is not.

A training whose work folder is gone goes on from them, with an empty optimizer: `--start-from <file>`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from gsoft_diffusion.foundation.files import whole_file


def keep(path: Path, model: nn.Module, images: int) -> None:
    """Write the weights of `model`, and how many images it has seen."""
    weights = {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with whole_file(path) as file:
        file.write(save(weights, {"images": str(images)}))


@torch.no_grad()
def start_from(path: Path, model: nn.Module) -> int:
    """Give `model` kept weights, whose names and shapes must be its own; returns how many images they have seen."""
    with safe_open(path, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118 - not a dict
        return int((file.metadata() or {})["images"])
