"""A GPU that is not there: tensors say `cuda:0` while their numbers are in main memory.

Inside `PretendedGPU()` an operation on tensors of both devices fails as on a real GPU, and branches on a tensor's
device take the GPU's side. Operations that would start a kernel are counted, and so are those that would wait for the
GPU. No driver is needed, and PyTorch's CPU build is enough. It knows nothing of time and of a GPU's own rounding.

    with PretendedGPU() as gpu:
        model.to("cuda")
        model(x.to("cuda")).sum().backward()
    print(gpu.kernels.total(), gpu.waits)

A tensor "on the GPU" is a wrapper: to PyTorch's C++ code it is on the meta device, for which the autograd engine needs
no device thread, and its Python attribute `device` is `cuda:0`. So nothing inside may use meta tensors for real. What
does, such as transformers' and diffusers' loading of weights, has to run in `gpu.suspended()`. Without gradients use
`torch.no_grad()`: in inference mode PyTorch does not take operations apart before they are seen here.

`PretendedGPU(numbers=False)` holds shapes alone, so that the operations of a model of any size are counted at once. An
attention product is one fused operation there, as on a GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, SupportsIndex
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import pin_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MEMORY = 2**34  # bytes that the GPU says it has, all of them free
aten = torch.ops.aten

# Operations that only look at memory in another way, or take memory without writing to it.
STARTS_NO_KERNEL = frozenset(
    """_conj _reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand
    is_pinned lift_fresh movedim new_empty new_empty_strided permute select set_ slice split split_with_sizes squeeze
    t transpose unbind unfold unsqueeze view view_as_complex view_as_real""".split()  # noqa: SIM905 - a list takes a line for each
)
TAKES_CPU_INDICES = frozenset([aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default])
# Elsewhere a tensor of no dimension on the CPU is a number to a GPU's kernels.
TAKES_NO_NUMBERS = frozenset("cat gather index_add index_select scatter scatter_add stack".split())  # noqa: SIM905
CROSSES_DEVICES = frozenset([aten._to_copy.default, aten.copy_.default, aten._copy_from.default])
# Operations whose result, or its shape, the program has to know before it goes on.
READS_VALUES = frozenset(
    """_local_scalar_dense _unique2 bincount equal is_nonzero masked_select nonzero repeat_interleave
    unique_consecutive unique_dim""".split()  # noqa: SIM905 - a list takes a line for each
)


# Memory of tensors "on the GPU" that are alive, and its bytes.
_memory: dict[int, tuple[StorageWeakRef, int]] = {}


class TensorOnGPU(Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers, on the CPU, or its shape, on the meta device."""

    held: Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
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
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {}, _tensors(args, kwargs or {}))


def bytes_in_use() -> int:
    """Memory of all tensors on the pretended GPU that are alive, those that autograd keeps included."""
    for key in [key for key, (reference, _) in _memory.items() if reference.expired()]:
        del _memory[key]
    return sum(size for _, size in _memory.values())


class PretendedGPU(TorchDispatchMode):
    """Counts what the operations inside the block would do on a GPU.

    kernels: how often each operation that starts a kernel was called, by its name.
    waits: how often the program waited until the GPU had finished, as `<operation> at <file>:<line>`: where it asked
    for a value, or copied a tensor from or to main memory. A copy to the GPU with `non_blocking=True` does not wait.
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
        torch._C._ensureCUDADeviceGuardSet()
        for patch in _driver_stand_ins():
            self._patches.enter_context(patch)
        if self._holds_on.type == "meta":
            functional = torch.nn.functional
            self._patches.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", self._attention))
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
        if func is aten._pin_memory.default:
            return args[0]  # for copies that need not wait
        tensors = _tensors(args, kwargs)
        if _on_gpu(tensors) or _result_on_gpu(func, args, kwargs, tensors):
            self._count(func, args, kwargs, tensors)
        if func is aten._local_scalar_dense.default and self._holds_on.type == "meta":
            return 1
        return _compute(func, args, kwargs, tensors, self._holds_on)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Any:
        return _FusedAttention.apply(self.kernels, query, key, value)

    def _count(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if _waits(func, name, args, kwargs, tensors):
            self.waits[f"{name} at {_caller()}"] += 1
        elif name not in STARTS_NO_KERNEL:
            self.kernels[name] += 1


class _Calls(TorchFunctionMode):
    """What PyTorch does before operations are dispatched, in code that asks the driver or knows no wrappers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = [_indexed(arg) for arg in args], {key: _indexed(arg) for key, arg in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            return func(*args, **(kwargs | {"device": "cpu"})).to(GPU)
        if func is Tensor.cuda:
            return args[0].to(GPU)
        if func is Tensor.tolist and isinstance(args[0], TensorOnGPU):
            return args[0].to("cpu").tolist()
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """The shapes of fused attention: it keeps its inputs, its result, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, kernels: Counter[str], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kernels["scaled_dot_product_attention"] += 1
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, row_sums)
        ctx.kernels = kernels
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.kernels["scaled_dot_product_attention_backward"] += 1
        return None, *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


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
        yield mock.patch.object(torch.cuda, name, return_value=answer)
    accelerator = {
        "current_accelerator": torch.device("cuda"),
        "current_device_index": GPU.index,
        "set_device_index": None,
        "current_stream": SimpleNamespace(is_capturing=lambda: False),
    }
    for name, answer in accelerator.items():
        yield mock.patch.object(torch.accelerator, name, return_value=answer)
    yield mock.patch.object(pin_memory, "pin_memory", lambda data, device=None: data)  # of data loaders


def _waits(func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
    if func in CROSSES_DEVICES:
        to_gpu = _result_on_gpu(func, args, kwargs, tensors)
        from_gpu = isinstance(args[1 if func is aten.copy_.default else 0], TensorOnGPU)
        at_once = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
        return to_gpu != from_gpu and not (to_gpu and at_once)
    if func in TAKES_CPU_INDICES:  # booleans: how many are true decides the shape; others are copied first
        indices = (index for index in args[1] if isinstance(index, Tensor) and index.ndim)
        return any(index.dtype == torch.bool or not isinstance(index, TensorOnGPU) for index in indices)
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


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What is in lists and tuples."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, each) for each in value)
    return change(value)


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, Tensor)]


def _on_gpu(tensors: list[Tensor]) -> bool:
    return any(isinstance(tensor, TensorOnGPU) for tensor in tensors)


def _result_on_gpu(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
    if func is aten.copy_.default:
        return isinstance(args[0], TensorOnGPU)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type in ("cuda", "meta")
    return _on_gpu(tensors)


def _compute(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], holds_on: torch.device = CPU) -> Any:
    """The operation on what is held, its result on the device where a GPU would have it."""
    least = 0 if func.overloadpacket.__name__.rstrip("_") in TAKES_NO_NUMBERS else 1
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, TensorOnGPU) and tensor.ndim >= least]
    if on_cpu and _on_gpu(tensors) and func not in CROSSES_DEVICES and func not in TAKES_CPU_INDICES:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in on_cpu)
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but {shapes} on cpu, others on {GPU}"
        )
    result_on_gpu = _result_on_gpu(func, args, kwargs, tensors)
    if result_on_gpu and any(isinstance(leaf, torch.Generator) for leaf in (*args, *kwargs.values())):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    held = {name: _mapped(_held, value) for name, value in kwargs.items() if name != "pin_memory"}
    if held.get("device") is not None:
        held["device"] = holds_on if result_on_gpu else CPU
    result = func(*_mapped(_held, args), **held)
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.is_mutable and isinstance(result, Tensor) and result is _held(args[0]):
        return args[0]
    return _mapped(_wrapped, result) if result_on_gpu else result


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, TensorOnGPU) else leaf


def _wrapped(leaf: Any) -> Any:
    # A conjugate is a mark on the same memory, which a wrapper does not have: it gets the numbers.
    return TensorOnGPU(leaf.resolve_conj()) if isinstance(leaf, Tensor) else leaf
