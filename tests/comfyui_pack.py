"""Parts of the node pack, loaded as the programs load them: from paths, outside of any package; and our own `W'`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from gsoft.config import RotationConfig
from gsoft.linear import RotatedLayer
from gsoft.rotation import Rotation, at_strength

PACK = Path(__file__).parent.parent / "comfyui"
WIDTHS = (24, 40)  # in, out


def load(name: str, path: Path) -> ModuleType:
    """A module, or a package by its `__init__.py`, under a name of our choice."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def learned(config: RotationConfig, widths: tuple[int, int] = WIDTHS, seed: int = 0) -> dict[str, Tensor]:
    """Numbers of one layer, by their names in a file."""
    generator = torch.Generator().manual_seed(seed)
    rotation = Rotation(config, *widths)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in rotation.state_dict().items()
    }


def own_weight(config: RotationConfig, numbers: dict[str, Tensor], weight: Tensor, strength: float) -> Tensor:
    """`W'` as `gsoft` computes it."""
    rotation = Rotation(config, weight.shape[1], weight.shape[0])
    rotation.load_state_dict(at_strength(numbers, strength))
    return RotatedLayer(rotation).rotated_weight(weight).detach()


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors are the same within 1e-5."""
    return torch.allclose(a, b, atol=1e-5, rtol=0)


def close_in_half(a: Tensor, b: Tensor) -> bool:
    """Whether two float16 tensors are at most one unit in the last place apart everywhere.

    Of numbers below 2⁻¹¹ within 2⁻²¹: there float16's units are finer than what is computed in float32 is exact to.
    """
    _, exponent = torch.frexp(b.float().abs().clamp(min=2**-11))
    unit = torch.exp2(exponent - 11.0)
    return a.dtype == b.dtype == torch.float16 and bool(((a.float() - b.float()).abs() <= unit).all())
