"""What all engines share: how many cells run at a time, and what a worker does with one."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.cells import Cell
from eval.experiment import Experiment
from eval.results import work_folder
from eval.run_cell import run_cell
from gsoft_diffusion.foundation.errors import UserError

ATTEMPTS = 3  # at a cell whose process or machine is lost


@dataclass(frozen=True)
class Workers:
    """How many cells run at a time.

    number: so many cells.
    cores: of the processor, for each of them.
    """

    number: int
    cores: int


def cores_each(workers: int) -> int:
    """Cores for one of `workers` cells at a time, of those of this machine that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def attempt(experiment: Experiment, cell: Cell, out: Path, cores: int) -> str | None:
    """`run_cell` on its cores, with what it prints in `work/logs/<id>.txt`, since on a terminal workers would mix.

    experiment, cell, out: as there. cores: threads to compute with.

    Returns the message of a UserError, which concerns all cells: engines would wrap the error itself, each in its own
    way. Other errors are raised.
    """
    torch.set_num_threads(cores)
    log = work_folder(out) / "logs" / f"{cell.id}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = file
        try:
            run_cell(experiment, cell, out)
        except UserError as error:
            return str(error)
        finally:
            sys.stdout, sys.stderr = before
    return None
