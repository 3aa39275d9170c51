"""Free memory: whether the weights will fit, and a message if memory runs out."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

from gsoft_diffusion.foundation.errors import UserError, first_line

UNUSED = "model_ema."  # a second copy of the weights that some single files hold, and that is not loaded
CGROUP = Path("/sys/fs/cgroup")  # where Linux says how much memory a container may use
FILE_CACHE = ("inactive_file ", "active_file ")


def check_weights(
    name: str, files: Iterable[tuple[Path, torch.dtype]], device: torch.device | str, advice: str
) -> None:
    """Raise UserError if the weights in the files do not fit into what is free on the device.

    name: the model's, for the message.
    files: safetensors files, each with the dtype that its weights will have.
    device: where the weights will be.
    advice: what the user can do, for the message, beside ending other programs; or nothing.

    From the files' headers alone. What a training step takes besides is estimated once they are loaded (`preflight`).
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return  # going there will say what is wrong
    try:
        needed = sum(_numbers_in(path) * dtype.itemsize for path, dtype in files)
    except (OSError, SafetensorError):
        return  # loading will say what is wrong with it
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"not enough memory for {name}: its weights alone take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are "
            f"free on {device}; end other programs{advice and f', or give {advice}'}"
        )


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: returning large tensors to the system at every step costs page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for what comes
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        limit, used, stat = ((CGROUP / f"memory.{what}").read_text() for what in ("max", "current", "stat"))
        # What is cached of files counts as used, but gives way: above all the weights just read.
        cached = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith(FILE_CACHE))
        return free if limit.strip() == "max" else min(free, int(limit) - int(used) + cached)
    except OSError:  # no container, or not Linux
        return free


def waits_not(device: torch.device) -> bool:
    """Whether a copy to the device may go on while the program does: on a CUDA GPU, which keeps the order of things.

    On Apple's GPUs the source may be freed or written to before it was read (PyTorch issues 139550 and 189690).
    """
    return device.type == "cuda"


def is_apart(device: torch.device) -> bool:
    """Whether the device has memory of its own: not the CPU, and not Apple's GPUs, which share the main memory."""
    return device.type not in ("cpu", "mps")


def _numbers_in(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith(UNUSED)]  # noqa: SIM118 - not a dict
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    said = ("can't allocate memory", "out of memory")  # by PyTorch on a CPU, and on Apple's GPUs
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)


@contextmanager
def running_out_explained(advice: str) -> Iterator[None]:
    """Inside the block, running out of memory on whatever device is a UserError that ends in `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({first_line(error)}); {advice}") from error
