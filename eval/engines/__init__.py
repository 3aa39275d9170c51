"""Engines that run cells: processes on this machine, Slurm, or Ray.

Every engine takes the same four things and returns when all cells are done. Every cell runs in a process of its own, so
that its peak memory is its own and nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from eval.cells import Cell
from eval.engines.local import run_locally
from eval.engines.ray_cluster import run_on_ray
from eval.engines.slurm import run_on_slurm
from eval.engines.worker import Workers
from eval.experiment import Experiment

ENGINES: dict[str, Callable[[Experiment, Sequence[Cell], Path, Workers], None]] = {
    "local": run_locally,
    "submitit": run_on_slurm,
    "ray": run_on_ray,
}
