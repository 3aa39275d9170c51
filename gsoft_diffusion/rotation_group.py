"""Equal-shaped projections whose rotations are made together, once, and kept as long as nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gsoft_diffusion.orthogonal import orthogonal_blocks
from gsoft_diffusion.rotated_linear import Rotation, rotate_weights, weight_side_is_cheaper

if TYPE_CHECKING:
    from gsoft_diffusion.projection import GSOFTProjection

TOGETHER = 2**18  # entries of weights that are made at a time: more calls cost time below, and a core's cache above


class RotationGroup:
    """The orthogonal blocks, and where they are asked for the rotated weights, of projections of equal shape.

    All blocks of the group go through the Cayley map in one batched call. Rotated weights are made when they are first
    asked for, small ones several at a time. Both are kept while no parameter and no weight changes: through all steps
    of sampling, and through all batches that gradients are accumulated over.

    A parameter has changed if PyTorch counted a new version of it, or if its value differs after a backward pass: some
    optimizers write behind the version's back. The first time that this has to be asked there is nothing to compare
    with yet, and it is taken to have changed.
    """

    def __init__(self, projections: Sequence[GSOFTProjection], linears: Sequence[nn.Linear] = ()) -> None:
        """linears: the projections' layers in the same order; without them weights are made one at a time."""
        self._projections, self._linears = tuple(projections), tuple(linears)
        self._compares = False  # whether values have been needed: until then no copy of them is made
        self.forget()

    def forget(self) -> None:
        """Let go of everything that is kept."""
        self._rotations: dict[torch.dtype, list[Rotation]] = {}  # by what their blocks are rounded to
        self._weights: dict[int, tuple[object, Tensor]] = {}  # and the states of the weights that they were made from
        self._values: Tensor | None = None  # of all parameters, from which all this was made
        self._states: list[list[object]] = []
        self.neutral = False  # whether all rotations are identities and all scales 1; known once blocks were asked for
        self._has_graph = self._differentiated = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies start with nothing kept: PyTorch does not copy tensors that are part of a graph."""
        empty = RotationGroup(())
        return vars(empty) | {"_projections": self._projections, "_linears": self._linears}

    def weight_side(self, tokens: int, weight: Tensor) -> bool:
        """Whether a projection should rotate its weight in training; see `weight_side_is_cheaper`."""
        return self._together(weight) > 1 or weight_side_is_cheaper(tokens, weight)

    def rotation(self, index: int, dtype: torch.dtype = torch.float32) -> Rotation:
        """That of one projection, its blocks rounded to this dtype."""
        self._drop_outdated(index)
        return self._all_rotations(dtype)[index]

    def weight(self, index: int, weight: Tensor) -> Tensor:
        """`W'` of one projection around `weight (out, in)`, in its dtype."""
        self._drop_outdated(index)
        state = tensor_state(weight)
        if index not in self._weights or self._weights[index][0] != state:
            count = self._together(weight)
            indices, weights = [index], [weight]
            if count > 1:
                near = range(index - index % count, len(self._linears))[:count]
                indices = [i for i in near if self._linears[i].weight.dtype == weight.dtype]
                weights = [self._linears[i].weight for i in indices]
            rotated = self._rotated(weights, [self._all_rotations(torch.float32)[i] for i in indices])
            for i, base, made in zip(indices, weights, rotated, strict=True):
                self._weights[i] = tensor_state(base), made
        return self._weights[index][1]

    def drop_weight(self, index: int) -> None:
        """Let go of one kept weight, which has been merged."""
        self._weights.pop(index, None)

    def _together(self, weight: Tensor) -> int:
        return max(1, TOGETHER // weight.numel()) if self._linears else 1

    def _drop_outdated(self, index: int) -> None:
        own = list(self._projections[index].parameters())
        wants_graph = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in own)
        suspect = self._differentiated or not self._states or self._states[index] != _states(own)
        if not suspect and (self._has_graph or not wants_graph):
            return
        parameters = [parameter for projection in self._projections for parameter in projection.parameters()]
        states = [_states(projection.parameters()) for projection in self._projections]
        same = states == self._states
        if same and self._differentiated:
            # Gradients are accumulated, or an optimizer wrote behind the version's back: only the values tell.
            same, self._compares = self._values is not None and torch.equal(_values(parameters), self._values), True
        if not same or (wants_graph and not self._has_graph):
            self.forget()
            if self._compares:
                self._values = _values(parameters)
            self._has_graph = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
            self.neutral = all(projection.neutral for projection in self._projections)
        self._states, self._differentiated = states, False

    def _all_rotations(self, dtype: torch.dtype) -> list[Rotation]:
        if dtype not in self._rotations:
            columns = zip(*((p.q_in, p.q_out, p.output_scale) for p in self._projections), strict=True)
            q_in, q_out, scales = columns
            blocks = self._kept(partial(self._make_blocks, dtype), len(q_in), *q_in, *q_out)
            self._rotations[dtype] = list(map(Rotation, blocks[: len(q_in)], blocks[len(q_in) :], scales))
        return self._rotations[dtype]

    def _make_blocks(self, dtype: torch.dtype, *free: Tensor) -> tuple[Tensor | None, ...]:
        """Blocks of `Q_in` of all projections, then of `Q_out`."""
        first, count = self._projections[0], len(self._projections)
        size = first.in_features // first.q_in.shape[1]
        right = orthogonal_blocks(free[:count], size, first.parametrization, dtype)
        if first.q_out is None:
            return *right, *(None for _ in right)
        size = first.out_features // first.q_out.shape[1]
        return *right, *orthogonal_blocks(free[count:], size, first.parametrization, dtype)

    def _rotated(self, weights: Sequence[Tensor], rotations: Sequence[Rotation]) -> Sequence[Tensor]:
        frozen, count = [weight.detach() for weight in weights], len(weights)

        def make(*columns: Tensor) -> tuple[Tensor, ...]:
            parts = (columns[:count], columns[count : 2 * count], columns[2 * count :])
            return rotate_weights(frozen, list(map(Rotation, *parts)))

        return self._kept(make, count, *chain(*zip(*rotations, strict=True)))

    def _kept(self, make: Callable[..., Sequence[Tensor | None]], count: int, *inputs: Tensor | None) -> Any:
        """`make(*inputs)`, whose graph survives backward passes; inputs and results are runs of `count` projections."""
        with torch.inference_mode(False), torch.set_grad_enabled(self._has_graph):
            return _Kept.apply(self, make, count, *inputs) if self._has_graph else make(*inputs)


class _Kept(torch.autograd.Function):
    """A piece of a computation with a graph of its own, that is differentiated as often as wanted.

    Projections that took no part in a loss get no gradient, as if each had been computed by itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group: RotationGroup,
        make: Callable[..., Sequence[Tensor | None]],
        count: int,
        *inputs: Tensor | None,
    ) -> Any:
        # Gradient checkpointing replaces saved tensors; it is not to see these, which are made once, not in every pass.
        # Detached, as hooks hold on to what they are given: an output that is saved would keep its own graph alive.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            ctx.leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
            ctx.made = make(*ctx.leaves)
        ctx.group, ctx.count = group, count
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.detach() for tensor in ctx.made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.group._differentiated = True
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
