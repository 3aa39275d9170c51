"""Blocks and weights made of the learned numbers, for equal-shaped layers together, cached until a number changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gsoft.blocks import orthogonal_blocks
from gsoft.costs import weight_side_is_cheaper, weights_at_once
from gsoft.differentiable_once import differentiable_once
from gsoft.linear_slice import AnyLinear
from gsoft.products import RotationBlocks, rotate_weights
from gsoft.rotation import Rotation


class RotationCache:
    """The orthogonal blocks, and where they are asked for the rotated weights, of layers of equal shape.

    A layer (see `RotatedLayer`) knows its index here and asks for `blocks` and `weight`; when they are made, and in how
    many calls, is nobody else's concern. All blocks go through the Cayley map in one batched call. Rotated weights are
    made when they are first asked for, small ones several at a time. Both are kept while no parameter and no weight
    changes: through all steps of sampling, and through all batches that gradients are accumulated over.

    A parameter has changed if PyTorch counted a new version of it, or if its value differs after a backward pass: some
    optimizers write behind the version's back. The first time that this has to be asked there is nothing to compare
    with yet, and it is taken to have changed. So it always is on a GPU, where a comparison would wait for the device.
    """

    def __init__(self, rotations: Sequence[Rotation], linears: Sequence[AnyLinear] = ()) -> None:
        """rotations: of equal shape. linears: their layers in the same order; without them, one weight at a time."""
        self._rotations, self._linears = tuple(rotations), tuple(linears)
        self._on_activations: set[int] = set()  # layers that rotated their activations the last time
        self._trained = False  # whether there has been a backward pass
        self._compares = False  # whether values have been needed: until then no copy of them is made
        self.clear()

    def clear(self) -> None:
        """Clear the cache."""
        self._blocks: dict[torch.dtype, list[RotationBlocks]] = {}  # by what they are rounded to
        self._weights: dict[int, tuple[object, Tensor]] = {}  # and the states of the weights that they were made from
        self._values: Tensor | None = None  # of all parameters, from which all this was made
        self._states: list[list[object]] = []
        self._all_identity: bool | None = None  # not known yet
        self._has_graph = self._differentiated = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies start with an empty cache: PyTorch does not copy tensors that are part of a graph."""
        empty = RotationCache(())
        return vars(empty) | {"_rotations": self._rotations, "_linears": self._linears}

    def weight_side(self, index: int, tokens: int, weight: Tensor) -> bool:
        """Whether a layer should rotate its weight in training; see `gsoft.costs.weight_side_is_cheaper`.

        index: the layer's place. tokens: how many vectors go through it. weight: its `W (out, in)`.
        """
        chosen = weight_side_is_cheaper(tokens, weight, self._weights_at_once(weight))
        (self._on_activations.discard if chosen else self._on_activations.add)(index)
        return chosen

    def expects_weight_side(self, index: int) -> bool:
        """Whether a layer is expected to rotate its weight in the next pass. index: the layer's place."""
        return index not in self._on_activations

    @property
    def all_identity(self) -> bool:
        """Whether all rotations are identities and all scales 1, as of the last call of `blocks` or `weight`.

        After the first backward pass they are taken to have learned something, so that a training step need not wait
        for a GPU to look.
        """
        if self._all_identity is None:
            self._all_identity = not self._trained and all(rotation.is_identity for rotation in self._rotations)
        return self._all_identity

    def blocks(self, index: int, dtype: torch.dtype = torch.float32) -> RotationBlocks:
        """The blocks and the scale of one layer.

        index: the layer's place. dtype: what the blocks are rounded to; the scale stays float32.
        """
        self._drop_outdated(index)
        return self._all_blocks(dtype)[index]

    def weight(self, index: int, weight: Tensor) -> Tensor:
        """`W'` of one layer, made now unless it is kept from before.

        index: the layer's place. weight: its `W (out, in)`, of the dtype of the result.
        """
        self._drop_outdated(index)
        state = tensor_state(weight)
        if index not in self._weights or self._weights[index][0] != state:
            count = self._weights_at_once(weight)
            indices, weights = [index], [weight]
            if count > 1:
                near = range(index - index % count, len(self._linears))[:count]
                indices = [i for i in near if i == index or self._goes_along(i, weight.dtype)]
                weights = [self._linears[i].weight for i in indices]
            rotated = self._rotated(weights, [self._all_blocks(torch.float32)[i] for i in indices])
            for i, base, made in zip(indices, weights, rotated, strict=True):
                self._weights[i] = tensor_state(base), made
        return self._weights[index][1]

    def differentiated(self) -> None:
        """Call it when a gradient went through a cached tensor: an optimizer may change parameters next."""
        self._differentiated = self._trained = True

    def drop_weight(self, index: int) -> None:
        """Drop one cached weight, which has been merged."""
        self._weights.pop(index, None)

    def _weights_at_once(self, weight: Tensor) -> int:
        return weights_at_once(weight) if self._linears else 1

    def _goes_along(self, index: int, dtype: torch.dtype) -> bool:
        """Whether a layer's weight is made together with another of this dtype."""
        return self._linears[index].weight.dtype == dtype and self.expects_weight_side(index)

    def _drop_outdated(self, index: int) -> None:
        own = list(self._rotations[index].parameters())
        wants_graph = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in own)
        suspect = self._differentiated or not self._states or self._states[index] != _states(own)
        if not suspect and (self._has_graph or not wants_graph):
            return
        parameters = [parameter for rotation in self._rotations for parameter in rotation.parameters()]
        states = [_states(rotation.parameters()) for rotation in self._rotations]
        same = states == self._states
        if same and self._differentiated:
            # Gradients are accumulated, or an optimizer wrote behind the version's back: only the values tell.
            self._compares = parameters[0].is_cpu
            same = self._compares and self._values is not None and torch.equal(_values(parameters), self._values)
        if not same or (wants_graph and not self._has_graph):
            self.clear()
            if self._compares:
                self._values = _values(parameters)
            self._has_graph = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        self._states, self._differentiated = states, False

    def _all_blocks(self, dtype: torch.dtype) -> list[RotationBlocks]:
        if dtype not in self._blocks:
            columns = zip(*((r.q_in, r.q_out, r.output_scale) for r in self._rotations), strict=True)
            q_in, q_out, scales = columns
            blocks = self._kept(partial(self._make_blocks, dtype), len(q_in), *q_in, *q_out)
            self._blocks[dtype] = list(map(RotationBlocks, blocks[: len(q_in)], blocks[len(q_in) :], scales))
        return self._blocks[dtype]

    def _make_blocks(self, dtype: torch.dtype, *free: Tensor) -> tuple[Tensor | None, ...]:
        """Blocks of `Q_in` of all layers, then of `Q_out`."""
        first, count = self._rotations[0], len(self._rotations)
        parametrization, size_in, size_out = first.parametrization, first.block_size_in, first.block_size_out
        if size_out is None:
            return *orthogonal_blocks(free[:count], size_in, parametrization, dtype), *(None for _ in range(count))
        q_in = orthogonal_blocks(free[:count], size_in, parametrization, dtype, double=True)
        return *q_in, *orthogonal_blocks(free[count:], size_out, parametrization, dtype, double=True)

    def _rotated(self, weights: Sequence[Tensor], blocks: Sequence[RotationBlocks]) -> Sequence[Tensor]:
        frozen, count = [weight.detach() for weight in weights], len(weights)

        def make(*columns: Tensor) -> tuple[Tensor, ...]:
            parts = (columns[:count], columns[count : 2 * count], columns[2 * count :])
            return rotate_weights(frozen, list(map(RotationBlocks, *parts)))

        return self._kept(make, count, *chain(*zip(*blocks, strict=True)))

    def _kept(self, make: Callable[..., Sequence[Tensor | None]], count: int, *inputs: Tensor | None) -> Any:
        """`make(*inputs)`, whose graph survives backward passes; inputs and results are runs of `count` layers."""
        with torch.inference_mode(False), torch.set_grad_enabled(self._has_graph):
            return _Kept.apply(self, make, count, *inputs) if self._has_graph else make(*inputs)


class _Kept(torch.autograd.Function):
    """A piece of a computation with a graph of its own, that is differentiated as often as wanted.

    Layers that took no part in a loss get no gradient, as if each had been computed by itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cache: RotationCache,
        make: Callable[..., Sequence[Tensor | None]],
        count: int,
        *inputs: Tensor | None,
    ) -> Any:
        # Gradient checkpointing replaces saved tensors; it is not to see these, which are made once, not in every pass.
        # Detached, as hooks hold on to what they are given: an output that is saved would keep its own graph alive.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            ctx.leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
            ctx.made = make(*ctx.leaves)
        ctx.cache, ctx.count = weakref.ref(cache), count  # which keeps the results, and they this
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.detach() for tensor in ctx.made)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if (cache := ctx.cache()) is not None:
            cache.differentiated()
        made, given = zip(*((m, g) for m, g in zip(ctx.made, grads, strict=True) if g is not None), strict=True)
        used = {index % ctx.count for index, grad in enumerate(grads) if grad is not None}
        wanted = {i: leaf for i, leaf in enumerate(ctx.leaves) if leaf is not None and i % ctx.count in used}
        by_leaf = torch.autograd.grad(made, list(wanted.values()), given, retain_graph=True, allow_unused=True)
        found = dict(zip(wanted, by_leaf, strict=True))
        return None, None, None, *(found.get(index) for index in range(len(ctx.leaves)))


def tensor_state(tensor: Tensor) -> tuple[object, ...]:
    """Changes whenever a tensor is replaced, moved, or written to with PyTorch's in-place operations."""
    return tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version


def _values(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def _states(parameters: Any) -> list[object]:
    return [(*tensor_state(parameter), parameter.requires_grad) for parameter in parameters]
