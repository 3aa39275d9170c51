"""What all benchmarks share: the machine, memory in use, and measurements that are kept as they come."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import processor

# Seconds on the wall, or of the processor: for machines on which other programs run at the same time.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Records:
    """Measurements in a JSON file that is written after each one, so that a run that was stopped goes on from there."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises SystemExit if the file holds measurements of other settings."""
        self.path = path
        here = {"settings": settings, "machine": machine()}
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else here | {"records": []}
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


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


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


def bytes_in_use() -> int | None:
    """What the process holds of its memory, to the byte; None where the C library does not count it (not glibc)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def reset_peak() -> None:
    """Give back what is free, and have the peak counted from now on, where the system can (glibc, Linux)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")


def peak_bytes() -> int | None:
    """Largest resident memory since `reset_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
