"""A GPU that is not there: tensors say `cuda:0` while their numbers are in main memory.

Inside `PretendedGPU()` an operation on tensors of both devices fails as on a real GPU, and branches on a device take
the GPU's side. Operations that would start a kernel are counted, and so are those that would wait for the GPU. No
driver is needed, and PyTorch's CPU build is enough. It knows nothing of time and of a GPU's own rounding.

    with PretendedGPU() as gpu:
        model.to("cuda:0")              # with the index: "cuda" alone asks for a driver
        model(x.to("cuda:0")).sum().backward()
    print(gpu.kernels.total(), gpu.waits)

A tensor "on the GPU" is a wrapper: to PyTorch's C++ code it is on the meta device, for which the autograd engine needs
no device thread, and its Python attribute `device` is `cuda:0`. So nothing inside may use meta tensors for real, and
models are loaded before.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten

# Operations that only look at memory in another way, or take memory without writing to it.
_VIEWS = """
_reshape_alias _unsafe_view alias as_strided detach diagonal empty_like empty_strided expand is_pinned lift_fresh
movedim new_empty new_empty_strided permute select set_ slice split split_with_sizes squeeze t transpose unbind
unfold unsqueeze view view_as_real
"""
STARTS_NO_KERNEL = frozenset(_VIEWS.split())
TAKES_CPU_INDICES = frozenset([aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default])
CROSSES_DEVICES = frozenset([aten._to_copy.default, aten.copy_.default, aten._copy_from.default])
READS_VALUES = frozenset(
    [aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default]
)


class TensorOnGPU(Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers, on the CPU."""

    held: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> TensorOnGPU:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device("meta"),
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        """held: the numbers, on the CPU."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"TensorOnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Counts what the operations inside the block would do on a GPU.

    kernels: how often each operation that starts a kernel was called, by its name. waits: how often a value was asked
    for, or a tensor copied to the CPU, for which the program waits until the GPU has finished.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> PretendedGPU:
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
        for patch in _driver_stand_ins():
            self._patches.enter_context(patch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def reset(self) -> None:
        """Forget what was counted."""
        self.kernels.clear()
        self.waits.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, TensorOnGPU) for leaf in tree_leaves((args, kwargs))):
            self._count(func, args, kwargs)
        return _compute(func, args, kwargs)

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.overloadpacket.__name__
        if func in READS_VALUES or (func in CROSSES_DEVICES and not _result_on_gpu(func, args, kwargs)):
            self.waits[name] += 1
        elif func in TAKES_CPU_INDICES and any(leaf.dtype == torch.bool for leaf in _tensors(args[1:])):
            self.waits[name] += 1  # how many are true decides the shape
        elif name not in STARTS_NO_KERNEL:
            self.kernels[name] += 1


def _driver_stand_ins() -> Iterator[Any]:
    """Answers that PyTorch's CUDA functions would get from a driver."""
    yield mock.patch.object(torch.cuda, "_lazy_init")
    yield mock.patch.object(torch.cuda, "synchronize")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _result_on_gpu(func: Any, args: Any, kwargs: Any) -> bool:
    if func is aten.copy_.default:
        return isinstance(args[0], TensorOnGPU)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type in ("cuda", "meta")
    return any(isinstance(tensor, TensorOnGPU) for tensor in _tensors((args, kwargs)))


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the numbers that are held, its result on the device where a GPU would have it."""
    tensors = _tensors((args, kwargs))
    on_gpu = any(isinstance(tensor, TensorOnGPU) for tensor in tensors)
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, TensorOnGPU) and tensor.ndim > 0]
    if on_gpu and on_cpu and func not in CROSSES_DEVICES | TAKES_CPU_INDICES:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in on_cpu)
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but {shapes} on cpu, others on {GPU}"
        )
    result_on_gpu = _result_on_gpu(func, args, kwargs)
    plain = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if plain.get("device") is not None:
        plain["device"] = torch.device("cpu")
    held_args, held_kwargs = tree_map(_held, (args, plain))
    result = func(*held_args, **held_kwargs)
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.is_mutable and isinstance(result, Tensor) and result is _held(args[0]):
        return args[0]
    return tree_map(lambda leaf: TensorOnGPU(leaf) if result_on_gpu and isinstance(leaf, Tensor) else leaf, result)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, TensorOnGPU) else leaf
