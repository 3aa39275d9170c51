"""Cells as processes of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from pathlib import Path

from tqdm.auto import tqdm

from eval.cells import Cell
from eval.engines.worker import Workers, attempt
from eval.experiment import Experiment
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.hub_access import stay_offline
from gsoft_diffusion.foundation.processes import end_with_parent


def run_locally(experiment: Experiment, cells: Sequence[Cell], out: Path, workers: Workers) -> None:
    """On this machine, so many cells at a time, each with its share of the cores. After a failure none is started.

    experiment: the settings that all cells share. cells: what to run. out: the comparison's folder. workers: cells at a
    time. The hub is not asked again for what is in its cache on this machine by now. Raises UserError if a cell's
    process is killed, and what a cell raised.
    """
    pool = ProcessPoolExecutor(workers.number, _process_context(), _begin, max_tasks_per_child=1)
    try:
        jobs = {pool.submit(attempt, experiment, cell, out, workers.cores): cell for cell in cells}
        with tqdm(total=len(cells), desc="cells", unit="cell") as progress:
            for job in as_completed(jobs):
                if message := job.result():
                    raise UserError(message)
                progress.set_postfix_str(jobs[job].id)
                progress.update()
    except BrokenProcessPool as error:
        raise UserError(
            "the process of a cell was killed, perhaps because memory ran out, and the others were ended; the same "
            f"command goes on with the cells that are missing (--workers {workers.number}: fewer need less memory)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # what is running ends first, its result is not lost (see above for a kill)


def _begin() -> None:
    end_with_parent()
    stay_offline()


def _process_context() -> BaseContext:
    """Processes forked, where the system can, from one that has imported everything and run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval.engines", "torch._dynamo"])  # optimizers import the latter when they start
    return context
