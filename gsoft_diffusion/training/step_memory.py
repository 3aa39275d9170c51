"""What a training step takes of memory, counted without running it: the step on tensors that have no contents.

Forward and backward pass of the real architecture go through PyTorch operation by operation, but on stand-ins that know
only shapes and types. Every result is counted from when it is made until it is let go of, so gradient checkpointing,
the adapter's own functions and what they keep are counted as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gsoft.costs import assumed
from gsoft_diffusion.models.families import BaseModel, chosen
from gsoft_diffusion.models.frozen_storage import FLOAT8, stored_weights
from gsoft_diffusion.training.trainable import TrainableAdapter

CPU = torch.device("cpu")
META = torch.device("meta")  # PyTorch's device for tensors without contents
# Who asks for contents is told yes: parameters have not changed within the step, and masks hide nothing.
CONTENTS = (torch.ops.aten.equal.default, torch.ops.aten._local_scalar_dense.default)


def step_bytes(
    model: BaseModel,
    adapter: TrainableAdapter,
    batch_size: int,
    latent_shape: tuple[int, int, int],
    *,
    trains_text: bool,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
) -> int:
    """Largest number of bytes that a step holds at a time beyond what there was before it: activations and gradients.

    model, adapter: the base model and what trains in it; they are not changed.
    batch_size: samples of one forward pass.
    latent_shape: `(C, h, w)` of a sample.
    trains_text: whether the adapter is in the text encoders too.
    gradient_checkpointing: whether activations are computed again in the backward pass instead of kept.
    dtype: of everything that is frozen, instead of the one it has.
    device: on which the step would run, as the adapter's layers choose by it what they rotate.

    At least this is needed: what kernels take for themselves, and memory between allocations, is not seen. Attention is
    fused, as it is by default. Raises whatever an architecture raises that cannot do without contents.
    """
    memory = _Memory()
    with memory:
        copies = _without_contents(model, adapter, dtype)
    # Outside: tensors that are no parameters, such as tables of positions, keep their contents.
    model, adapter = deepcopy((model, adapter), copies)
    with memory, assumed(device):
        if gradient_checkpointing:
            model.checkpoint_gradients()
        for network in (model.denoiser, *model.text_encoders):
            network.train()
        with torch.no_grad():
            prepared = model.prepare([""])
            prompts = {} if trains_text else model.encode(prepared)
        before = memory.peak = memory.held
        if trains_text:
            prompts = model.encode(prepared)
        conditioning = chosen(prompts, torch.zeros(batch_size, dtype=torch.long))
        latents, views = torch.zeros(batch_size, *latent_shape), torch.zeros(batch_size, 6)
        model.predict(latents, torch.zeros(batch_size), conditioning, views).square().mean().backward()
    return memory.peak - before


class _Memory(TorchDispatchMode):
    """Inside the block every operation gives a `_Shape`, and all that is alive is counted.

    held, peak: bytes now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in CONTENTS:
            return True
        result = func(*_map(_shape_alone, args), **_map(_shape_alone, kwargs or {}))
        in_place = func._schema.is_mutable and func._schema.name.endswith("_")
        return args[0] if in_place else _map(self._counted, result)

    def _counted(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()  # shared by all views
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._let_go, key, size)
        return _Shape(value)

    def _let_go(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.held -= size


class _Shape(Tensor):
    """A tensor that says it is on the CPU, so that code takes its usual way, and has a meta tensor for contents."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Self:
        shape = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=CPU,
        )
        shape.meta = meta
        return shape

    __torch_dispatch__ = None  # type: ignore[assignment] # only inside the block


def _shape_alone(value: Any) -> Any:
    """What an operation gets to see on the meta device."""
    if isinstance(value, _Shape):
        return value.meta
    if isinstance(value, Tensor):
        return value.to(META)
    return META if isinstance(value, torch.device) else value


def _map(change: Callable[[Any], Any], values: Any) -> Any:
    """`change` of all that is in tuples, lists and dicts."""
    if isinstance(values, dict):
        return {name: _map(change, value) for name, value in values.items()}
    return type(values)(_map(change, v) for v in values) if isinstance(values, tuple | list) else change(values)


def _without_contents(model: BaseModel, adapter: TrainableAdapter, dtype: torch.dtype | None) -> dict[int, Any]:
    """What `deepcopy` takes by its ids: the VAE as it is, and a shape for each parameter and buffer of all else."""
    networks = (model.denoiser, *model.all_text_encoders(), adapter)
    copies: dict[int, Any] = {id(part): part for name in model.parts() if (part := getattr(model, name)) is not None}
    for network in networks:
        copies.pop(id(network), None)
        for tensor in (*network.parameters(), *network.buffers(), *stored_weights(network)):
            frozen = tensor.is_floating_point() and not tensor.requires_grad and tensor.dtype != FLOAT8
            shape: Tensor = torch.empty_like(tensor, device="cpu", dtype=dtype if frozen else None)
            if isinstance(tensor, nn.Parameter):
                shape = nn.Parameter(shape, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = shape
    return copies
