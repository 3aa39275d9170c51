"""Frozen layers that are stored otherwise than they compute: in eight bits, in main memory, or both.

As in `quantization`, only layers that no adapter uses. A layer fetches its weight when it computes, and again in the
backward pass; in between it keeps nothing but what is stored.

diffusers' hooks for this, layerwise casting and group offloading, change a module's weight before its forward pass and
back after it. Autograd keeps the changed weight until the backward pass, so without recomputed activations they save
nothing in training (`benchmarks/frozen_storage.py` measures it of casting), and they have no scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gsoft_diffusion.foundation.memory import waits_not
from gsoft_diffusion.models.quantization import numbers_in, quantizable

FLOAT8 = torch.float8_e4m3fn


class StoredLinear(nn.Module):
    """What an `nn.Linear` with a frozen weight does.

    weight: as it is stored, `(out, in)`. It is no parameter: processes that train together would send it each other,
    which they cannot in eight bits. Where the model is moved it goes along, unless it stays in main memory.
    scale: `(out, 1)`, by which a weight in eight bits is multiplied, in the dtype that the layer computes in; else
    None. Its numbers are powers of two, so that multiplying rounds nothing.
    """

    scale: Tensor | None

    def __init__(self, linear: nn.Linear, *, float8: bool, in_main_memory: bool) -> None:
        """linear: frozen; its bias is taken over. float8: store the weight in eight bits (E4M3), each row scaled to
        their range. in_main_memory: store it there; pinned if there is a GPU, so that it need not wait for copies.
        """
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight, scale = linear.weight.detach(), None
        if float8:
            scale = _scale(self.weight)
            self.weight = (self.weight / scale).to(FLOAT8)
        self.register_buffer("scale", scale, persistent=False)
        self.in_main_memory = in_main_memory
        if in_main_memory:
            weight = self.weight.cpu()
            self.weight = weight.pin_memory() if torch.cuda.is_available() else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to` and the like do."""
        super()._apply(fn, recurse)
        if not self.in_main_memory:
            self.weight = self.weight.to(fn(self.weight).device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.scale, self.bias)


class _Product(torch.autograd.Function):
    """`x Wᵀ + bias`, differentiable by x, which keeps the weight as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.stored, ctx.scale = stored, scale
        return F.linear(x, _fetched(stored, scale, x.device), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ _fetched(ctx.stored, ctx.scale, grad.device), None, None, None


def store(model: nn.Module, fused_attention: bool, *, float8: bool, in_main_memory: bool) -> None:
    """Put a `StoredLinear` in the place of every layer that no adapter uses (see `quantizable`).

    model: the network, changed in place; it computes in the dtype of its weights, as before. fused_attention: as in
    `quantizable`. float8, in_main_memory: as in `StoredLinear`; at least one.
    """
    for path, linear in quantizable(model, fused_attention).items():
        model.set_submodule(path, StoredLinear(linear, float8=float8, in_main_memory=in_main_memory))


def stored_layers(model: nn.Module, fused_attention: bool) -> dict[str, nn.Linear | StoredLinear]:
    """The layers that `store` replaces or has replaced, by their paths. fused_attention: as in `quantizable`."""
    replaced = {path: each for path, each in model.named_modules() if isinstance(each, StoredLinear)}
    return {**quantizable(model, fused_attention), **replaced}


def stored_weights(model: nn.Module) -> list[Tensor]:
    """The weights that `store` has put into a model: all of it that is neither parameter nor buffer."""
    return [each.weight for each in model.modules() if isinstance(each, StoredLinear)]


def number_count(model: nn.Module) -> int:
    """How many numbers a model's weights are, however they are stored."""
    return sum(map(numbers_in, model.parameters())) + sum(map(Tensor.numel, stored_weights(model)))


def _scale(weight: Tensor) -> Tensor:
    """For each row the least power of two with which it fits into the range of eight bits.

    It is no less than the weight's dtype has with all of its digits: in float16 that of tiny weights would become 0.
    """
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    exponent = (largest / torch.finfo(FLOAT8).max).log2().ceil()
    scale = exponent.exp2().clamp(min=torch.finfo(weight.dtype).smallest_normal)
    return scale.where(largest > 0, 1.0).to(weight.dtype)


def _fetched(stored: Tensor, scale: Tensor | None, device: torch.device) -> Tensor:
    weight = stored.to(device, non_blocking=waits_not(device))
    return weight if scale is None else weight.to(scale.dtype) * scale
