"""What a bound of the change of a network's outputs is good for: 1-Lipschitz activations, and certified robustness.

All norms are Euclidean: of a whole picture, and of all logits.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from gsoft.errors import GSOFTError
from gsoft.linear import RotatedLinear

# Modules that move no two inputs apart, whatever their settings. Subclasses may do something else.
ONE_LIPSCHITZ = (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ReLU)


class MaxMin(nn.Module):
    """Sort the channels two by two, the larger one first: an activation that keeps the norm of gradients.

    The channels of a pair are neighbours, `2i` and `2i+1`, which a paired shuffle keeps together; or `i` and `i + n/2`.
    (Anil, Lucas and Grosse, ICML 2019.)
    """

    def __init__(self, pairs: Literal["neighbours", "halves"] = "neighbours", dim: int = -3) -> None:
        """pairs: which channels are compared. dim: the channels' dimension. Raises GSOFTError for other pairs."""
        super().__init__()
        if pairs not in ("neighbours", "halves"):
            raise GSOFTError(f"MaxMin: pairs is {pairs!r}; valid: 'neighbours', 'halves'")
        self.pairs, self.dim = pairs, dim

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape, an even number along dim; returns the same shape. Raises GSOFTError if the number is odd."""
        channels, dim = x.shape[self.dim], self.dim % x.ndim
        if channels % 2:
            raise GSOFTError(f"MaxMin: {channels} channels cannot be paired")
        shape, of_pair = ((-1, 2), dim + 1) if self.pairs == "neighbours" else ((2, -1), dim)
        first, second = x.unflatten(dim, shape).unbind(of_pair)
        return torch.stack([torch.maximum(first, second), torch.minimum(first, second)], of_pair).flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        return f"pairs={self.pairs!r}, dim={self.dim}"


def certified_radius(logits: Tensor, lipschitz: float = 1.0) -> Tensor:
    """How far each input can be moved, in Euclidean norm, without another class being predicted.

    logits: `(…, classes)`. lipschitz: a bound of the Lipschitz constant of the map from inputs to logits. Returns
    `(…,)`: the difference of the two largest logits, divided by `√2·lipschitz` (Tsuzuku et al., NeurIPS 2018).
    """
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return (first - second) / (math.sqrt(2) * lipschitz)


def lipschitz_bound(model: nn.Module) -> float:
    """A bound of the Lipschitz constant of a sequence of layers, in its present mode: the product of theirs.

    model: a layer or an `nn.Sequential` of them, nested at will. Known are orthogonal layers of this library, `MaxMin`,
    `nn.Linear` (by its largest singular value), `nn.Dropout`, layers that only move or leave out entries, and modules
    whose class has a method `lipschitz_bound()`; a `plain_copy` has the bound that its model has in evaluation mode,
    and is not known by itself. Raises GSOFTError that names the module of another kind, such as a subclass with a
    `forward` but no `lipschitz_bound()` of its own, or a layer with an adapter that is not merged.

    The bound is of float32 or float64 arithmetic. Half precision, autocast, and TF32, which PyTorch lets convolutions
    take on GPUs (`torch.backends.cudnn.allow_tf32`), round by more than orthogonality allows.
    """
    return _bound(model, type(model).__name__)


def _bound(module: nn.Module, name: str) -> float:
    own = getattr(module, "lipschitz_bound", None)
    if own is not None and _states_its_bound(type(module)):
        return float(own())
    if type(module).forward is nn.Sequential.forward:
        assert isinstance(module, nn.Sequential)
        return math.prod(_bound(child, f"{name}.{index}") for index, child in enumerate(module))
    if type(module) in (MaxMin, *ONE_LIPSCHITZ):
        return 1.0
    if type(module) is nn.Dropout:
        return 1.0 if not module.training or module.p == 1 else 1 / (1 - module.p)
    if _computes_as_linear(module):
        assert isinstance(module, nn.Linear)
        return float(torch.linalg.matrix_norm(module.weight.detach().double(), ord=2))
    raise GSOFTError(f"{name}: no bound of the Lipschitz constant of {type(module).__name__} is known")


def _states_its_bound(kind: type) -> bool:
    """Whether a class has a bound of what it computes: not where a `forward` has come after the method was written."""
    for each in kind.__mro__:
        if "lipschitz_bound" in vars(each):
            return True
        if "forward" in vars(each):
            return False
    return False


def _computes_as_linear(module: nn.Module) -> bool:
    """Whether the module is a product with its weight: not where a subclass or an adapter computes something else."""
    merged = isinstance(module, RotatedLinear) and not module.rotated.active
    return merged or type(module).forward is nn.Linear.forward
