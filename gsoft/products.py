"""The product with a rotated weight, `y = diag(s)·Q_out W Q_in x` around a frozen `W`, computed on either of two sides.

With `W' = diag(s)·Q_out W Q_in` (see `group_and_shuffle` for blocks and shapes):

- on the weight's side `W'` is built once per optimizer step and used in an ordinary linear call. The rotation's cost
  does not grow with the number of tokens, but the backward pass needs `∂ℓ/∂W' = gᵀx`, which a frozen weight does not;
- on the activations' side `x` is rotated, multiplied by the frozen `W`, and the result is rotated. Nothing of the
  weight's size is computed, but every token passes through all block products.

Both keep for the backward pass only what cannot be made again cheaply, and give the same numbers up to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gsoft.autocast import without_autocast
from gsoft.differentiable_once import differentiable_once
from gsoft.group_and_shuffle import (
    back_to_input,
    back_to_input_rows,
    rotate,
    rotate_back,
    rotate_gradients,
    scale_gradient,
    scale_outputs_,
)


class RotationBlocks(NamedTuple):
    """What is put around one weight `(out, in)`.

    q_in: blocks of `Q_in`, `(m, r, b, b)`; q_out: of `Q_out`, or None; output_scale: `s (out,)`, or None.
    """

    q_in: Tensor
    q_out: Tensor | None
    output_scale: Tensor | None


def rotate_weights(weights: Sequence[Tensor], rotations: Sequence[RotationBlocks]) -> tuple[Tensor, ...]:
    """`W' = diag(s)·Q_out W Q_in` (paper, §6.2) of each of some weights of equal shape, in their dtype.

    weights: `(out, in)` each. rotations: one for each, float32. Computed in float32 (float64 for float64 weights);
    autocast changes nothing. Differentiable once by the rotations; with gradients, bfloat16 weights are rotated in TF32
    on GPUs that have it.
    """
    given = list(chain(*zip(*rotations, strict=True)))
    trains = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    return _RotatedWeights.apply(trains and weights[0].dtype == torch.bfloat16, *weights, *given)


def rotate_activations(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    rotations: Sequence[RotationBlocks],
    identity: bool,
) -> tuple[Tensor, ...]:
    """`W'x + bias` of each of some equal-shaped layers for the same x, with `W'` as in `rotate_weights`.

    x: `(…, in)`. layers: weight `(out, in)` and bias of each. rotations: one for each, float32, or blocks already in
    the dtype of x, to which they are rounded. identity: all rotations are identities and all scales 1, so the plain
    layers' own products are taken, to the bit. Returns one tensor `(…, out)` for each, in the dtype of x.
    Differentiable once by x and the rotations.
    """
    columns = chain(*zip(*layers, strict=True), *zip(*rotations, strict=True))
    return _RotatedActivations.apply(identity, len(layers), x, *columns)


class _RotatedWeights(torch.autograd.Function):
    """Wᵀ → V = Q_inᵀ Wᵀ → W' = S Vᵀ, where `S = diag(s)·Q_out`. Only what is given is kept."""

    @staticmethod
    def forward(ctx: Any, in_tf32: bool, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.in_tf32 = in_tf32
        weights, *rotations = _split(tensors, 4)
        with without_autocast(weights[0].device), _tf32(in_tf32):
            stacked = torch.stack(weights)
            q_in, scaled_q_out = _blocks(_computed_in(stacked), *rotations)
            if scaled_q_out is None:
                return rotate_back(q_in, stacked.mT, rows=True).to(stacked.dtype).unbind()
            return rotate(scaled_q_out, rotate_back(q_in, stacked.mT).mT, dtype=stacked.dtype).unbind()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, *rotations = _split(ctx.saved_tensors, 4)
        transposed = torch.stack(weights).mT
        q_in, scaled_q_out = _blocks(_computed_in(transposed), *rotations)
        grad, by_scaled_q_out = torch.stack(grads), None
        with _tf32(ctx.in_tf32):
            if scaled_q_out is not None:
                by_scaled_q_out, grad = rotate_gradients(scaled_q_out, rotate_back(q_in, transposed).mT, grad)
                grad = back_to_input(scaled_q_out, grad)
            by_q_in, _ = rotate_gradients(q_in, grad.mT, transposed)
        return None, *(None for _ in weights), *_rotation_gradients(by_q_in, by_scaled_q_out, *rotations)


class _RotatedActivations(torch.autograd.Function):
    """x → z = Q_in x → h = Wz → y = S h + bias, `S = diag(s)·Q_out`, for N layers at once.

    Kept: x, as columns, and h where there is an S.
    """

    @staticmethod
    def forward(ctx: Any, identity: bool, count: int, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, *rotations = _split(tensors, 5)
        ctx.shape = x.shape
        x = x.reshape(-1, x.shape[-1])  # (T, in)
        columns = x.mT.contiguous()
        q_in, scaled_q_out = _blocks(x.dtype, *rotations)
        if identity:
            outputs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            h = torch.stack([F.linear(x, weight).mT for weight in weights]) if scaled_q_out is not None else None
        else:
            z = rotate(q_in, columns.expand(count, -1, -1))  # (N, in, T)
            h = _products(weights, z)  # (N, out, T)
            outputs = list(h.mT.contiguous() if scaled_q_out is None else rotate(scaled_q_out, h, rows=True))
            outputs = [y if bias is None else y.add_(bias) for y, bias in zip(outputs, biases, strict=True)]
        ctx.save_for_backward(columns, None if scaled_q_out is None else h, *weights, *chain(*rotations))
        # As `.data` they are no views, which might not be changed in place, nor does one count the others' changes.
        return tuple(y.reshape(*ctx.shape[:-1], y.shape[-1]).data for y in outputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *tensors = ctx.saved_tensors
        weights, *rotations = _split(tensors, 4)
        q_in, scaled_q_out = _blocks(x.dtype, *rotations)
        count, by_scaled_q_out = len(grads), None
        grad = torch.stack([grad.reshape(-1, grad.shape[-1]) for grad in grads]).mT  # (N, out, T)
        if scaled_q_out is not None:
            by_scaled_q_out, grad = rotate_gradients(scaled_q_out, h, grad)
            grad = back_to_input(scaled_q_out, grad)
        grad = _products([weight.mT for weight in weights], grad)  # (N, in, T)
        by_q_in, grad = rotate_gradients(q_in, x.expand(count, -1, -1), grad)
        by_x = back_to_input_rows(q_in, grad).reshape(ctx.shape) if ctx.needs_input_grad[2] else None
        wanted = ctx.needs_input_grad[3 + count : 3 + 2 * count]  # an adapter freezes biases; people may thaw them
        by_biases = [g.reshape(-1, g.shape[-1]).sum(0) if want else None for g, want in zip(grads, wanted, strict=True)]
        return None, None, by_x, *[None] * count, *by_biases, *_rotation_gradients(by_q_in, by_scaled_q_out, *rotations)


class _TF32:
    """While a thread is inside, float32 products on GPUs may take tensor cores, which round factors to 11 bits.

    That is for results that end in the 8 bits of bfloat16, whose own rounding is far larger. Identity blocks still give
    back a bfloat16 weight to the bit, as its numbers are numbers of TF32. PyTorch has one such setting for a process,
    and a backward pass has a thread for each GPU: the last one that leaves sets it back. Whoever has set it to exact
    products keeps them.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, "none"

    @contextmanager
    def __call__(self, allowed: bool) -> Iterator[None]:
        """allowed: False changes nothing."""
        if not allowed:
            yield
            return
        with self._lock:
            if not self._inside:
                self._before = torch.backends.cuda.matmul.fp32_precision
                if self._before != "ieee":
                    torch.backends.cuda.matmul.fp32_precision = "tf32"
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._before != "ieee":
                    torch.backends.cuda.matmul.fp32_precision = self._before


_tf32 = _TF32()


def _split(tensors: Sequence[Any], columns: int) -> list[tuple[Any, ...]]:
    """Runs of equal length: one for what each of the N layers has of a kind."""
    count = len(tensors) // columns
    return [tuple(tensors[first : first + count]) for first in range(0, len(tensors), count)]


def _blocks(
    dtype: torch.dtype, q_ins: Sequence[Tensor], q_outs: Sequence[Tensor | None], scales: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Blocks of `Q_in` and of `S = diag(s)·Q_out` of N layers, `(N, m, r, b, b)`; no S if there is neither."""
    q_in = _stacked_blocks(q_ins).to(dtype)
    scaled_q_out = _unscaled(q_outs, scales)
    if scaled_q_out is not None and scales[0] is not None:
        scaled_q_out = scale_outputs_(scaled_q_out, torch.stack(tuple(scales)))  # type: ignore[arg-type]
    return q_in, None if scaled_q_out is None else scaled_q_out.to(dtype)


def _unscaled(q_outs: Sequence[Any], scales: Sequence[Any]) -> Tensor | None:
    """Blocks of `Q_out`, a copy; without it, but with a scale, of an identity in blocks of side 1."""
    if q_outs[0] is not None:
        return _stacked_blocks(q_outs)
    return None if scales[0] is None else scales[0].new_ones(len(scales), 1, len(scales[0]), 1, 1)


def _stacked_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks `(m, r, b, b)` of N layers as `(N, m, r, b, b)`, in memory factor by factor, as they are used."""
    return torch.stack(tuple(blocks), dim=1).transpose(0, 1)


def _rotation_gradients(
    by_q_in: Tensor,
    by_scaled_q_out: Tensor | None,
    q_ins: Sequence[Tensor],
    q_outs: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients by the rotations of N layers, in their dtype, from those by the blocks that `_blocks` made of them."""
    nothing = tuple(None for _ in q_ins)
    by_q_outs: Sequence[Tensor | None] = nothing
    by_scales: Sequence[Tensor | None] = nothing
    if by_scaled_q_out is not None:
        if scales[0] is not None:
            by_scales = scale_gradient(_unscaled(q_outs, scales), by_scaled_q_out).unbind()  # type: ignore[arg-type]
            by_scaled_q_out = scale_outputs_(by_scaled_q_out, torch.stack(tuple(scales)))  # type: ignore[arg-type]
        if q_outs[0] is not None:
            by_q_outs = by_scaled_q_out.to(q_outs[0].dtype).unbind()
    return *by_q_in.to(q_ins[0].dtype).unbind(), *by_q_outs, *by_scales


def _products(weights: Sequence[Tensor], vectors: Tensor) -> Tensor:
    """`W x (N, out, T)` of N weights, each with its own x `(N, in, T)`."""
    made = vectors.new_empty(len(weights), weights[0].shape[0], vectors.shape[-1])
    for weight, x, y in zip(weights, vectors, made, strict=True):
        torch.mm(weight, x, out=y)
    return made


def _computed_in(weights: Tensor) -> torch.dtype:
    """Float32 or float64: in which weights are rotated, whatever their own dtype."""
    return torch.promote_types(weights.dtype, torch.float32)
