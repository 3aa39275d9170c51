"""A GPU that is not there: tensors say `cuda:0` while their numbers are in main memory.

Inside `PretendedGPU()` an operation on tensors of both devices fails as on a real GPU, and branches on a tensor's device
take the GPU's side. Operations that would start a kernel are counted, and so are those that would wait for the GPU. No
driver is needed, and PyTorch's CPU build is enough. It knows nothing of time and of a GPU's own rounding.

    with PretendedGPU() as gpu:
        model.to("cuda")
        model(x.to("cuda")).sum().backward()
    print(gpu.kernels.total(), gpu.waits)

A tensor "on the GPU" is a wrapper: to PyTorch's C++ code it is on the meta device, for which the autograd engine needs
no device thread, and its Python attribute `device` is `cuda:0`. So nothing inside may use meta tensors for real. What
does, such as transformers' and diffusers' loading of weights, has to run in `gpu.suspended()`.

`PretendedGPU(numbers=False)` holds shapes alone, so that the operations of a model of any size are counted at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import pin_memory
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
MEMORY = 2**34  # bytes that the GPU says it has, all of them free
aten = torch.ops.aten

# Operations that only look at memory in another way, or take memory without writing to it.
STARTS_NO_KERNEL = frozenset(
    """_reshape_alias _unsafe_view alias as_strided detach diagonal empty_like empty_strided expand is_pinned lift_fresh
    movedim new_empty new_empty_strided permute select set_ slice split split_with_sizes squeeze t transpose unbind
    unfold unsqueeze view view_as_real""".split()
)
TAKES_CPU_INDICES = frozenset([aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default])
# Elsewhere a tensor of no dimension on the CPU is a number to a GPU's kernels.
TAKES_NO_NUMBERS = frozenset("cat gather index_add index_select scatter scatter_add stack".split())
CROSSES_DEVICES = frozenset([aten._to_copy.default, aten.copy_.default, aten._copy_from.default])
# Operations whose result, or its shape, the program has to know before it goes on.
READS_VALUES = frozenset(
    """_local_scalar_dense _unique2 bincount equal is_nonzero masked_select nonzero repeat_interleave unique_consecutive
    unique_dim""".split()
)


# Memory of tensors "on the GPU" that are alive, and its bytes.
_memory: dict[int, tuple[StorageWeakRef, int]] = {}


class TensorOnGPU(Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers, on the CPU, or its shape, on the meta device."""

    held: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: int) -> Any:
        """A file has the numbers, and whoever reads it says where they go."""
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorOnGPU:
        copied = TensorOnGPU(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)  # type: ignore[assignment]
        memo[id(self)] = copied
        return copied

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
        """held: the numbers, on the CPU, or the shape, on the meta device."""
        storage = held.untyped_storage()
        reference = StorageWeakRef(storage)
        _memory[reference.cdata] = reference, storage.nbytes()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"TensorOnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def bytes_in_use() -> int:
    """Memory of all tensors on the pretended GPU that are alive, those that autograd keeps included."""
    for key in [key for key, (reference, _) in _memory.items() if reference.expired()]:
        del _memory[key]
    return sum(size for _, size in _memory.values())


class PretendedGPU(TorchDispatchMode):
    """Counts what the operations inside the block would do on a GPU.

    kernels: how often each operation that starts a kernel was called, by its name. waits: how often the program waited
    until the GPU had finished, as `<operation> at <file>:<line>`: where it asked for a value, or copied a tensor from or
    to main memory. A copy to the GPU need not wait: it does not with `non_blocking=True`.
    """

    def __init__(self, numbers: bool = True) -> None:
        """numbers: False to hold shapes alone; a value that is asked for is then 1."""
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._holds_on = torch.device("cpu" if numbers else "meta")
        self._patches = contextlib.ExitStack()
        self._calls = _Calls()

    def __enter__(self) -> PretendedGPU:
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
        for patch in _driver_stand_ins():
            self._patches.enter_context(patch)
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)
        self._patches.close()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block tensors are made where they would be without this: for code that uses the meta device."""
        super().__exit__(None, None, None)
        self._calls.__exit__(None, None, None)
        try:
            yield
        finally:
            self._calls.__enter__()
            super().__enter__()

    def reset(self) -> None:
        """Forget what was counted."""
        self.kernels.clear()
        self.waits.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _result_on_gpu(func, args, kwargs) or any(
            isinstance(leaf, TensorOnGPU) for leaf in _tensors((args, kwargs))
        ):
            self._count(func, args, kwargs)
        if func is aten._local_scalar_dense.default and self._holds_on.type == "meta":
            return 1
        return _compute(func, args, kwargs, self._holds_on)

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.overloadpacket.__name__
        if _waits(func, name, args, kwargs):
            self.waits[f"{name} at {_caller()}"] += 1
        elif name not in STARTS_NO_KERNEL:
            self.kernels[name] += 1


class _Calls(TorchFunctionMode):
    """What PyTorch does in C++ code that asks the driver, or that knows no wrappers, before operations are dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = [_indexed(arg) for arg in args], {key: _indexed(arg) for key, arg in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            return func(*args, **(kwargs | {"device": "cpu"})).to(GPU)
        if func is Tensor.cuda:
            return args[0].to(GPU)
        if func is Tensor.tolist and isinstance(args[0], TensorOnGPU):
            return args[0].to("cpu").tolist()
        return func(*args, **kwargs)


def _indexed(argument: Any) -> Any:
    """`cuda` is the current device, the only one."""
    is_gpu = isinstance(argument, str | torch.device) and str(argument) in ("cuda", "cuda:0")
    return GPU if is_gpu else argument


def _driver_stand_ins() -> Iterator[Any]:
    """Answers that PyTorch's CUDA functions would get from a driver."""
    properties = SimpleNamespace(name="pretended GPU", major=8, minor=0, total_memory=MEMORY, multi_processor_count=100)
    answers = {
        "_lazy_init": None,
        "synchronize": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "mem_get_info": (MEMORY, MEMORY),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "manual_seed_all": None,
    }
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    yield mock.patch.object(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )
    stream = SimpleNamespace(is_capturing=lambda: False)
    yield mock.patch.object(torch.accelerator, "current_stream", lambda device=None: stream)
    yield mock.patch.object(torch.accelerator, "set_device_index", lambda device: None)
    yield mock.patch.object(torch.accelerator, "current_device_index", lambda: GPU.index)
    yield mock.patch.object(pin_memory, "pin_memory", lambda data, device=None: data)  # of data loaders


def _waits(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    tensors = _tensors((args, kwargs))
    if func in CROSSES_DEVICES:
        to_gpu = _result_on_gpu(func, args, kwargs)
        from_gpu = isinstance(args[1 if func is aten.copy_.default else 0], TensorOnGPU)
        at_once = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
        return to_gpu != from_gpu and not (to_gpu and at_once)
    if func in TAKES_CPU_INDICES:  # booleans: how many are true decides the shape; others are copied first
        return any(leaf.dtype == torch.bool or not isinstance(leaf, TensorOnGPU) for leaf in tensors[1:] if leaf.ndim)
    return name in READS_VALUES


def _caller() -> str:
    """Who called PyTorch, as `<file>:<line>`."""
    frame = sys._getframe(2)
    inside = (str(Path(torch.__file__).parent), __file__)
    while frame.f_back and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    root = next((root for root in (Path(__file__).parents[1], *map(Path, sys.path)) if path.is_relative_to(root)), None)
    return f"{path.relative_to(root) if root else path}:{frame.f_lineno}"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _result_on_gpu(func: Any, args: Any, kwargs: Any) -> bool:
    if func is aten.copy_.default:
        return isinstance(args[0], TensorOnGPU)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type in ("cuda", "meta")
    return any(isinstance(tensor, TensorOnGPU) for tensor in _tensors((args, kwargs)))


def _compute(func: Any, args: Any, kwargs: dict[str, Any], holds_on: torch.device = torch.device("cpu")) -> Any:
    """The operation on what is held, its result on the device where a GPU would have it."""
    tensors = _tensors((args, kwargs))
    on_gpu = any(isinstance(tensor, TensorOnGPU) for tensor in tensors)
    least = 0 if func.overloadpacket.__name__.rstrip("_") in TAKES_NO_NUMBERS else 1
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, TensorOnGPU) and tensor.ndim >= least]
    if on_gpu and on_cpu and func not in CROSSES_DEVICES | TAKES_CPU_INDICES:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in on_cpu)
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but {shapes} on cpu, others on {GPU}"
        )
    result_on_gpu = _result_on_gpu(func, args, kwargs)
    if result_on_gpu and any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    plain = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if plain.get("device") is not None:
        plain["device"] = holds_on if result_on_gpu else torch.device("cpu")
    held_args, held_kwargs = tree_map(_held, (args, plain))
    result = func(*held_args, **held_kwargs)
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.is_mutable and isinstance(result, Tensor) and result is _held(args[0]):
        return args[0]
    return tree_map(lambda leaf: TensorOnGPU(leaf) if result_on_gpu and isinstance(leaf, Tensor) else leaf, result)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, TensorOnGPU) else leaf
