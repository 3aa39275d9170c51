"""What all benchmarks share: the machine, memory in use, and measurements that are kept as they come."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import processor
from gsoft_diffusion.config.command_line import expanded_path


def when_gpu_is_done() -> float:
    """Seconds on the wall, once the GPU has finished all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


# Seconds on the wall, also behind a GPU, or of the processor: for machines on which other programs run meanwhile.
CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
    "gpu": when_gpu_is_done,
}
CPU = torch.device("cpu")


def clock_for(device: torch.device) -> str:
    """The clock to measure by, unless another is asked for."""
    return "gpu" if device.type == "cuda" else "wall"


class Records:
    """Measurements in a JSON file that is written after each one, so that a run that was stopped goes on from there."""

    def __init__(self, path: Path, settings: dict[str, Any], device: torch.device = CPU) -> None:
        """Raises SystemExit if the file holds something else, or measurements of other settings."""
        self.path = path
        here = {"settings": settings, "machine": machine(device)}
        self.content: dict[str, Any] = _read(path) if path.exists() else here | {"records": []}
        if {name: self.content[name] for name in here} != here:
            raise SystemExit(f"{path}: measured with other settings or on another machine; give another --out")

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.content["records"]

    def has(self, **key: Any) -> bool:
        return any(key.items() <= record.items() for record in self.records)

    def add(self, **record: Any) -> None:
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if content.keys() >= {"settings", "machine", "records"}:
            return content
    except (OSError, ValueError, AttributeError):  # a folder, no JSON, or a list
        pass
    raise SystemExit(f"{path}: holds no measurements that can be gone on with; give another --out")


def file_to_write(text: str) -> Path:
    """For argparse: the path of a file, whose folder is made at once. What takes minutes would be lost without it."""
    path = expanded_path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"{path}: {error.strerror}; choose another place") from error
    if path.is_dir():
        raise ArgumentTypeError(f"{path}: is a folder; give the name of a file")
    return path


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the measurements depend on besides their settings."""
    gpu = {"gpu": gpu_facts(device)} if device.type == "cuda" else {}
    return gpu | {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """The card's name, memory and compute capability, its driver, and the CUDA version that PyTorch was built with."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
    }


def _driver_version() -> str | None:
    """As the driver's own program says it; None where that is not to be found."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip() if said.strip() else None


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """A fourth, half and three fourths of the values are no larger; they are two or more."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


MALLINFO2 = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2]


def bytes_in_use(device: torch.device = CPU) -> int | None:
    """What tensors hold on a GPU, or the process of its memory, to the byte; None where the C library does not count
    that (not glibc).
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def reset_peak(device: torch.device = CPU) -> None:
    """Give back what is free, and have the peak counted from now on, where the system can (GPU; glibc, Linux)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")


def peak_bytes(device: torch.device = CPU) -> int | None:
    """The most that tensors held on a GPU, or the largest resident memory, since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
