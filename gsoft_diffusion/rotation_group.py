"""Equal-shaped projections whose rotations are made together, once, and kept as long as nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gsoft_diffusion.orthogonal import orthogonal_blocks
from gsoft_diffusion.rotated_linear import rotate_weights, weight_side_is_cheaper

if TYPE_CHECKING:
    from gsoft_diffusion.projection import GSOFTProjection

TOGETHER = 2**17  # entries of weights that are made at a time: more calls cost time below, and a core's cache above


class RotationGroup:
    """The orthogonal blocks, and where they are asked for the rotated weights, of projections of equal shape.

    All blocks of the group go through the Cayley map in one batched call. Rotated weights are made when they are first
    asked for, small ones several at a time. Both are kept while no parameter and no weight changes: through all steps
    of sampling, and through all batches that gradients are accumulated over.

    A parameter has changed if PyTorch counted a new version of it, or if its value differs after a backward pass: some
    optimizers write behind the version's back.
    """

    def __init__(self, projections: Sequence[GSOFTProjection], linears: Sequence[nn.Linear] = ()) -> None:
        """linears: the projections' layers in the same order; without them weights are made one at a time."""
        self._projections, self._linears = tuple(projections), tuple(linears)
        self.forget()

    def forget(self) -> None:
        """Let go of everything that is kept."""
        self._blocks: list[tuple[Tensor, Tensor | None]] | None = None
        self._weights: dict[int, tuple[object, Tensor]] = {}  # and the states of the weights that they were made from
        self._values: Tensor | None = None  # of all parameters, from which all this was made
        self._states: list[object] = []
        self.neutral = False  # whether all rotations are identities and all scales 1; known once blocks were asked for
        self._has_graph = self._differentiated = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies start with nothing kept: PyTorch does not copy tensors that are part of a graph."""
        empty = RotationGroup(())
        return vars(empty) | {"_projections": self._projections, "_linears": self._linears}

    def weight_side(self, tokens: int, weight: Tensor) -> bool:
        """Whether a projection should rotate its weight in training; see `weight_side_is_cheaper`."""
        return self._together(weight) > 1 or weight_side_is_cheaper(tokens, weight)

    def blocks(self, index: int) -> tuple[Tensor, Tensor | None]:
        """`right (m, r, b, b)` and `left` of one projection, as `rotated_linear` takes them; float32."""
        self._drop_outdated(index)
        return self._all_blocks()[index]

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
            rotated = self._rotated(weights, [self._all_blocks()[i] for i in indices])
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
        values = torch.cat([parameter.detach().flatten() for parameter in parameters])
        graph = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        same = self._values is not None and self._values.device == values.device and torch.equal(values, self._values)
        if not same or (wants_graph and not self._has_graph):
            self.forget()
            self._values, self._has_graph = values, graph
            self.neutral = all(projection.neutral for projection in self._projections)
        self._states = [_states(projection.parameters()) for projection in self._projections]
        self._differentiated = False

    def _all_blocks(self) -> list[tuple[Tensor, Tensor | None]]:
        if self._blocks is None:
            q_in, q_out, scales = (
                [parameter for projection in self._projections if (parameter := getattr(projection, name)) is not None]
                for name in ("q_in", "q_out", "output_scale")
            )
            count = len(q_in)
            made = self._kept(self._make_blocks, count, *q_in, *q_out, *scales)
            right, left = made[:count], made[count:] or (None,) * count
            self._blocks = list(zip(right, left, strict=True))
        return self._blocks

    def _make_blocks(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Right blocks of all projections, then left blocks of all if there are any."""
        first, count = self._projections[0], len(self._projections)
        q_in = torch.stack(parameters[:count])
        made = orthogonal_blocks(q_in, first.in_features // first.q_in.shape[1], first.parametrization).unbind()
        left = None
        if first.q_out is not None:
            q_out = torch.stack(parameters[count : 2 * count])
            left = orthogonal_blocks(q_out, first.out_features // first.q_out.shape[1], first.parametrization)
        if first.output_scale is not None:
            left = scale_outputs(left, torch.stack(parameters[-count:]))
        return made if left is None else (*made, *left.unbind())

    def _rotated(self, weights: Sequence[Tensor], blocks: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Tensor]:
        count = len(weights)
        frozen = [weight.detach() for weight in weights]

        def make(*parts: Tensor) -> tuple[Tensor, ...]:
            left = torch.stack(parts[count:]) if len(parts) > count else None
            return rotate_weights(frozen, torch.stack(parts[:count]), left).unbind()

        rights, lefts = zip(*blocks, strict=True)
        return self._kept(make, count, *rights, *(left for left in lefts if left is not None))

    def _kept(self, make: Callable[..., tuple[Tensor, ...]], count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`make(*inputs)`, whose graph survives backward passes; inputs and results are runs of `count` projections."""
        with torch.inference_mode(False), torch.set_grad_enabled(self._has_graph):
            return _Kept.apply(self, make, count, *inputs) if self._has_graph else make(*inputs)


class _Kept(torch.autograd.Function):
    """A piece of a computation with a graph of its own, that is differentiated as often as wanted.

    Projections that took no part in a loss get no gradient, as if each had been computed by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, group: RotationGroup, make: Callable[..., tuple[Tensor, ...]], count: int, *inputs: Tensor
    ) -> Any:
        # Gradient checkpointing replaces saved tensors; it is not to see these, which are made once, not in every pass.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            ctx.leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            ctx.made = make(*ctx.leaves)
        ctx.group, ctx.count = group, count
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in ctx.made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.group._differentiated = True
        made, given = zip(*((m, g) for m, g in zip(ctx.made, grads, strict=True) if g is not None), strict=True)
        by_leaf = torch.autograd.grad(made, ctx.leaves, given, retain_graph=True, allow_unused=True)
        used = {index % ctx.count for index, grad in enumerate(grads) if grad is not None}
        return None, None, None, *(grad if index % ctx.count in used else None for index, grad in enumerate(by_leaf))


def scale_outputs(blocks: Tensor | None, scale: Tensor) -> Tensor:
    """`diag(scale)·Q` as blocks: the last factor's rows are multiplied. Without Q, one factor with blocks of side 1.

    blocks: `(…, m, r, b, b)`; scale: `(…, n)`.
    """
    if blocks is None:
        return scale[..., None, :, None, None]
    nfactors, nblocks, size, _ = blocks.shape[-4:]
    rows = scale.unflatten(-1, (nblocks, size))  # (…, r, b)
    for _ in range(nfactors - 1):
        rows = rows.flatten(-2).unflatten(-1, (size, nblocks)).mT
    return torch.cat([blocks[..., :-1, :, :, :], (rows[..., None] * blocks[..., -1, :, :, :]).unsqueeze(-4)], -4)


def tensor_state(tensor: Tensor) -> tuple[object, ...]:
    """Changes whenever a tensor is replaced, moved, or written to with PyTorch's in-place operations."""
    return tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version


def _states(parameters: Any) -> list[object]:
    return [(*tensor_state(parameter), parameter.requires_grad) for parameter in parameters]
