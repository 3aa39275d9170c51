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
from itertools import chain
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


def rotate_activations(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor | None]], neutral: bool
) -> tuple[Tensor, ...]:
    """`left(W Q_in x) + bias` of each of some equal-shaped layers for the same x `(…, in)`, in its dtype.

    layers: weight, bias, right and left of each; blocks are rounded to the dtype of x. neutral: all blocks are
    identities, so the plain layers' own products are taken, to the bit. Differentiable once by x, right and left.
    """
    return _RotatedActivations.apply(neutral, x, len(layers), *chain(*zip(*layers, strict=True)))


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
    """x → z = Q_in x → h = Wz → y = left(h) + bias, for N layers at once. Kept: x, and h where there is a left."""

    @staticmethod
    def forward(ctx: Any, neutral: bool, x: Tensor, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, rights, lefts = (tensors[i : i + count] for i in range(0, len(tensors), count))
        ctx.shape, ctx.with_left = x.shape, lefts[0] is not None
        x = x.reshape(-1, x.shape[-1])  # (T, in)
        if neutral:
            outputs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            h = torch.stack([F.linear(x, weight).mT for weight in weights]) if ctx.with_left else None
        else:
            z = rotate(torch.stack(rights).to(x.dtype), _turned(x).expand(count, -1, -1))  # (N, in, T)
            h = _products(weights, z)  # (N, out, T)
            y = rotate(torch.stack(lefts).to(x.dtype), h) if ctx.with_left else h
            outputs = [_turned(rows) for rows in y]
            outputs = [y if bias is None else y.add_(bias) for y, bias in zip(outputs, biases, strict=True)]
        ctx.save_for_backward(x, h if ctx.with_left else None, *weights, *rights, *lefts)
        return tuple(y.reshape(*ctx.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *tensors = ctx.saved_tensors
        count = len(grads)
        weights, rights, lefts = (tensors[i : i + count] for i in range(0, len(tensors), count))
        grad = torch.stack([_turned(grad.reshape(len(x), -1)) for grad in grads])  # (N, out, T)
        by_left: Sequence[Tensor | None] = [None] * count
        if ctx.with_left:
            by_blocks, grad = rotate_gradients(torch.stack(lefts).to(x.dtype), h, grad)
            by_left = by_blocks.to(lefts[0].dtype).unbind()
        grad = _products([weight.mT for weight in weights], grad)  # (N, in, T)
        turned = _turned(x).expand(count, -1, -1)
        by_right, grad = rotate_gradients(torch.stack(rights).to(x.dtype), turned, grad)
        by_x = _turned(grad[0] if count == 1 else grad.sum(0)).reshape(ctx.shape)
        return None, by_x, None, *[None] * (2 * count), *by_right.to(rights[0].dtype).unbind(), *by_left


def _products(weights: Sequence[Tensor], vectors: Tensor) -> Tensor:
    """`W x (N, out, T)` of N weights, each with its own x `(N, in, T)`."""
    made = vectors.new_empty(len(weights), weights[0].shape[0], vectors.shape[-1])
    for weight, x, y in zip(weights, vectors, made, strict=True):
        torch.mm(weight, x, out=y)
    return made


def _stacked_and_turned(weights: Sequence[Tensor]) -> Tensor:
    """`Wᵀ (N, in, out)`, in float32 or float64."""
    return _turned(torch.stack([weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]))


def _turned(x: Tensor) -> Tensor:
    """The transposed matrix, contiguous: block products on contiguous columns are several times faster."""
    return x.mT.contiguous()
