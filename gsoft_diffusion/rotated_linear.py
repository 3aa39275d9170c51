"""The product with a rotated weight, `y = D Q_in x` around a frozen `W`, computed on either of two sides.

`right` are the blocks of `Q_in`, `left` those of the output map: `Q_out` with the output scale multiplied in (see
`group_and_shuffle` for blocks and shapes). With `W' = left(W Q_in)`:

- on the weight's side `W'` is built once per optimizer step and used in an ordinary linear call. The rotation's cost
  does not grow with the number of tokens, but the backward pass needs `∂ℓ/∂W' = gᵀx`, which a frozen weight does not;
- on the activations' side `x` is rotated, multiplied by the frozen `W`, and the result is rotated. Nothing of the
  weight's size is computed, but every token passes through all block products.

Both keep for the backward pass only what cannot be made again cheaply, and give the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gsoft_diffusion.group_and_shuffle import rotate, rotate_back, rotate_gradients

# While one entry of a tensor goes through all block products of a training step, on either side, a dense product does
# about this many multiply-adds (measured on a CPU for blocks up to 32: see docs/performance.md). Times the item size,
# because products in half precision run twice as fast.
PASSES = 1600


def weight_side_is_cheaper(tokens: int, weight: Tensor) -> bool:
    """Whether a training step costs less with the weight rotated than with the activations, by counting.

    Weight: its `out·in` entries through the blocks, and `tokens·out·in` for its gradient. Activations: `tokens·in`
    entries through the inner half of the blocks, `tokens·out` through the outer half.
    """
    out_features, in_features = weight.shape
    passes = PASSES // weight.element_size()
    return out_features * in_features * (tokens + passes) <= tokens * (in_features + out_features) * passes / 2


def rotate_weights(weights: Sequence[Tensor], right: Tensor, left: Tensor | None) -> Tensor:
    """`W' (N, out, in)` of `N` weights `(out, in)` in their dtype, computed in float32 (float64 for float64 weights).

    right `(N, m, r, b, b)`, left: float32. autocast changes nothing. Differentiable once by right and left.
    """
    return _RotatedWeights.apply(right, left, *weights)


def rotate_activations(x: Tensor, weight: Tensor, bias: Tensor | None, right: Tensor, left: Tensor | None) -> Tensor:
    """`left(W Q_in x) + bias` for x `(…, in)`, in the dtype of x; blocks are rounded to it.

    With identity blocks the result is bit-equal to the plain layer's: the bias goes through the frozen layer's own
    fused product, `y = left(Wz + bias) + (bias − left(bias))`. Differentiable once by x, right and left.
    """
    return _RotatedActivations.apply(x, weight, bias, right, left)


class _RotatedWeights(torch.autograd.Function):
    """Wᵀ → V = Q_inᵀ Wᵀ → W' = left(Vᵀ). Only the frozen `W` and the blocks are kept."""

    @staticmethod
    def forward(ctx: Any, right: Tensor, left: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(right, left, *weights)
        turned = _stacked_and_turned(weights)
        with torch.autocast(turned.device.type, enabled=False):
            rotated = _turned(rotate_back(right.to(turned.dtype), turned))
            if left is not None:
                rotated = rotate(left.to(turned.dtype), rotated)
        return rotated.to(weights[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        right, left, *weights = ctx.saved_tensors
        turned = _stacked_and_turned(weights)
        dtype = turned.dtype
        grad, by_left = grad.to(dtype), None
        if left is not None:
            by_left, grad = rotate_gradients(left.to(dtype), _turned(rotate_back(right.to(dtype), turned)), grad)
            by_left = by_left.to(left.dtype)
        by_right, _ = rotate_gradients(right.to(dtype), _turned(grad), turned)
        return by_right.to(right.dtype), by_left, *(None for _ in weights)


class _RotatedActivations(torch.autograd.Function):
    """x → z = Q_in x → h = Wz + bias → y = left(h) + (bias − left(bias)). Kept: x, and Wz if there is a left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, right: Tensor, left: Tensor | None) -> Tensor:
        ctx.shape = x.shape
        x = x.reshape(-1, x.shape[-1])  # (T, in)
        z = rotate(right.to(x.dtype), _turned(x))
        y = F.linear(_turned(z), weight, bias)
        h = None
        if left is not None:
            h = _turned(y)  # (out, T)
            y = rotate(left.to(x.dtype), h)
            if bias is not None:
                y = y + _bias_correction(bias, left)[:, None]
                h = h - bias[:, None]
            y = _turned(y)
        ctx.save_for_backward(x, h, weight, right, left)
        return y.reshape(*ctx.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor | None]:
        x, h, weight, right, left = ctx.saved_tensors
        grad = _turned(grad.reshape(-1, grad.shape[-1]))  # (out, T)
        by_left = None
        if left is not None:
            by_left, grad = rotate_gradients(left.to(x.dtype), h, grad)
            by_left = by_left.to(left.dtype)
        by_right, grad = rotate_gradients(right.to(x.dtype), _turned(x), weight.mT @ grad)
        return _turned(grad).reshape(ctx.shape), None, None, by_right.to(right.dtype), by_left


def _stacked_and_turned(weights: Sequence[Tensor]) -> Tensor:
    """`Wᵀ (N, in, out)`, in float32 or float64."""
    return _turned(torch.stack([weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]))


def _turned(x: Tensor) -> Tensor:
    """The transposed matrix, contiguous: block products on contiguous columns are several times faster."""
    return x.mT.contiguous()


def _bias_correction(bias: Tensor, left: Tensor) -> Tensor:
    dtype = torch.promote_types(bias.dtype, torch.float32)
    exact = bias.to(dtype)
    return (exact - rotate(left.to(dtype), exact[:, None])[:, 0]).to(bias.dtype)
