"""A linear layer that does the work of several, of which slices are rotated, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsoft.autocast import autocast_is_on
from gsoft.differentiable_once import differentiable_once
from gsoft.linear import RotatedLayer, rotate_together
from gsoft.linear_slice import LinearSlice


class RotatedSlices:
    """What computes with a linear layer of which slices are rotated, each by itself; the rest stays as it is.

    Where weights are rotated, the rotated slices and the rest are put together for one product with the whole matrix:
    at the start and after merging the output is that of the plain layer, to the bit. The matrix that is put together is
    not kept for the backward pass, so that kept are the slices, as if they were layers of their own.
    """

    def __init__(self, slices: Sequence[tuple[LinearSlice, RotatedLayer]]) -> None:
        """slices: of one layer, all rows or all columns, that do not overlap; and what computes with each.

        Raises ValueError if they are otherwise.
        """
        ordered = sorted(slices, key=lambda pair: pair[0].start)
        whole, self.dim = ordered[0][0].whole, ordered[0][0].dim
        if any((one.whole, one.dim) != (whole, self.dim) for one, _ in ordered):
            raise ValueError("slices of different layers, or rows and columns")
        self.pieces: list[tuple[LinearSlice, RotatedLayer | None]] = []  # in order, the rest of the matrix included
        end, size = 0, (whole.out_features, whole.in_features)[self.dim]
        for one, rotated in ordered:
            if one.start < end:
                raise ValueError("slices overlap")
            if one.start > end:
                self.pieces.append((LinearSlice(whole, self.dim, end, one.start - end), None))
            self.pieces.append((one, rotated))
            end = one.start + one.length
        if end < size:
            self.pieces.append((LinearSlice(whole, self.dim, end, size - end), None))

    @property
    def rotated(self) -> list[tuple[LinearSlice, RotatedLayer]]:
        """The slices that are rotated at present: neither switched off nor merged."""
        return [(one, rotated) for one, rotated in self.pieces if rotated is not None and rotated.active]

    @property
    def active(self) -> bool:
        """False where the plain layer is right as it is."""
        return bool(self.rotated)

    def __call__(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """What the layer makes of x.

        linear: the whole layer. x: `(…, in_features)`. Returns `(…, out_features)` in the dtype the plain layer would
        give. Raises GSOFTError as `RotatedLayer.check`.
        """
        if not torch.compiler.is_compiling():
            return self._compute(linear, x)
        if all(isinstance(rotated.prepared, Tensor) for _, rotated in self.rotated):
            return self._one_product(linear, x, [rotated.prepared for _, rotated in self.rotated])  # type: ignore[misc]
        return self._by_slices(linear, x)

    @torch.compiler.disable
    def _compute(self, linear: nn.Linear, x: Tensor) -> Tensor:
        for one, rotated in self.rotated:
            rotated.check(one)
        inputs = self._inputs(x)
        # Every layer is asked, for it is remembered what it takes.
        sides = [
            rotated.rotates_activations(one, part)
            for (one, rotated), part in zip(self.pieces, inputs, strict=True)
            if rotated is not None and rotated.active
        ]
        if not any(sides):
            weights = [rotated.cache.weight(rotated.index, one.weight) for one, rotated in self.rotated]
            return self._one_product(linear, x, weights)
        outputs = self._by_slices(linear, x)
        if all(rotated.cache.all_identity for _, rotated in self.rotated):
            return _SameTo.apply(F.linear(x, linear.weight, linear.bias), outputs)
        return outputs

    def _one_product(self, linear: nn.Linear, x: Tensor, rotated_weights: Sequence[Tensor]) -> Tensor:
        """With a matrix put together of all pieces.

        rotated_weights: those of `self.rotated`, in the same order.
        """
        made = iter(rotated_weights)
        weights = [next(made) if rotated is not None and rotated.active else one.weight for one, rotated in self.pieces]
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
        # autocast is left to decide what is computed in which precision.
        if not differentiated or autocast_is_on(x.device):
            return F.linear(x, torch.cat(weights, dim=self.dim), linear.bias)
        learned = tuple(rotated is not None and rotated.active for _, rotated in self.pieces)
        return _FusedProduct.apply(x, linear.bias, self.dim, learned, *weights)

    def _by_slices(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Piece by piece, each on the side that it takes."""
        inputs = self._inputs(x)
        if self.dim == 1:
            outputs = [
                one(part) if rotated is None else rotated(one, part)
                for (one, rotated), part in zip(self.pieces, inputs, strict=True)
            ]
            return reduce(torch.add, outputs if linear.bias is None else [*outputs, linear.bias])
        slices = [(one, rotated) for one, rotated in self.pieces if rotated is not None]
        made = iter(rotate_together([rotated for _, rotated in slices], [one for one, _ in slices], x))
        return torch.cat([one(x) if rotated is None else next(made) for one, rotated in self.pieces], dim=-1)

    def _inputs(self, x: Tensor) -> Sequence[Tensor]:
        """What each piece takes of x."""
        if self.dim == 0:
            return [x] * len(self.pieces)
        return x.split([one.length for one, _ in self.pieces], dim=-1)


class _FusedProduct(torch.autograd.Function):
    """`F.linear(x, W, bias)` with W put together of pieces along a dimension.

    Kept are the pieces, not W, and of x the columns that gradients by pieces need: all of x for rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, dim: int, learned: Sequence[bool], *pieces: Tensor) -> Tensor:
        """learned: which of the pieces have a gradient."""
        ctx.dim, ctx.learned = dim, learned
        if dim == 0:
            inputs = [x]
        else:  # a view would keep all of x
            columns = x.split([piece.shape[1] for piece in pieces], dim=-1)
            inputs = [part.contiguous() for part, wanted in zip(columns, learned, strict=True) if wanted]
        ctx.save_for_backward(*inputs, *pieces)
        return F.linear(x, torch.cat(pieces, dim=dim), bias).detach()  # a view might not be changed in place

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(ctx.learned)
        inputs, pieces = saved[:-count], saved[-count:]
        by_x = grad @ torch.cat(pieces, dim=ctx.dim) if ctx.needs_input_grad[0] else None
        rows = grad.split([piece.shape[0] for piece in pieces], dim=-1) if ctx.dim == 0 else [grad] * count
        columns = iter([inputs[0]] * count if ctx.dim == 0 else inputs)
        by_pieces = [
            _flat(part).mT @ _flat(next(columns)) if wanted else None
            for part, wanted in zip(rows, ctx.learned, strict=True)
        ]
        by_bias = _flat(grad).sum(0) if ctx.needs_input_grad[1] else None
        return by_x, by_bias, None, None, *by_pieces


def _flat(x: Tensor) -> Tensor:
    """`(…, n)` as a matrix."""
    return x.reshape(-1, x.shape[-1])


class _SameTo(torch.autograd.Function):
    """The first tensor's values with the second's gradient: where both are the same number, computed in two ways."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, computed: Tensor) -> Tensor:
        return values.detach()  # a view might not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
