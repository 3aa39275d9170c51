"""Time and peak memory of `make demo`, after the installation.

python -m benchmarks.demo --out benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

INSTALLED = ".venv/.installed"  # the Makefile's mark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    out: Path = parser.parse_args().out.expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["make", INSTALLED], check=True)
    started = time.perf_counter()
    subprocess.run(["make", "demo"], check=True)
    report = {
        "seconds": round(time.perf_counter() - started, 1),
        # of the largest process; Linux counts in KiB, macOS in bytes
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        // (2**20 if platform.system() == "Darwin" else 2**10),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": processor(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
