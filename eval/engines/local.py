"""Cells as processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import cycle, islice
from multiprocessing.context import BaseContext
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from eval.cells import Cell
from eval.engines.worker import Workers, attempt
from eval.experiment import Experiment
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.hub_access import stay_offline
from gsoft_diffusion.foundation.processes import end_with_parent

VISIBLE = "CUDA_VISIBLE_DEVICES"  # decides which GPUs a process sees

free_gpus: SimpleQueue[str] | None = None  # in a cell's process, those that no cell is on; None without GPUs


def run_locally(experiment: Experiment, cells: Sequence[Cell], out: Path, workers: Workers) -> None:
    """On this machine, so many cells at a time, each with its share of the cores and GPUs.

    After a failure none is started. A cell sees one GPU. The cells share the GPUs evenly.

    experiment: the settings that all cells share. cells: what to run. out: the comparison's folder. workers: cells at a
    time. The hub is not asked again for what is in its cache on this machine by now. Raises UserError if a cell's
    process is killed, and what a cell raised.
    """
    context = _process_context()
    free = _queue(context, list(islice(cycle(_gpus()), workers.number)))
    pool = ProcessPoolExecutor(workers.number, context, _begin, (free,), max_tasks_per_child=1)
    try:
        jobs = {pool.submit(_on_a_gpu, attempt, experiment, cell, out, workers.cores): cell for cell in cells}
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


def _gpus() -> list[str]:
    """The GPUs that this process may use, each as `VISIBLE` names it."""
    count = torch.cuda.device_count()
    chosen = os.environ.get(VISIBLE)
    return (chosen.split(",") if chosen else [str(number) for number in range(count)])[:count]


def _queue(context: BaseContext, values: Sequence[str]) -> SimpleQueue[str] | None:
    """A queue of these values, which processes share; None if there are none."""
    if not values:
        return None
    queue: SimpleQueue[str] = context.SimpleQueue()
    for value in values:
        queue.put(value)
    return queue


def _begin(free: SimpleQueue[str] | None) -> None:
    global free_gpus
    free_gpus = free
    end_with_parent()
    stay_offline()


def _on_a_gpu(work: Callable[..., str | None], *given: Any) -> str | None:
    """`work(*given)` in this process, which from now on sees one GPU, the next that is free, if there are any."""
    if free_gpus is None:
        return work(*given)
    gpu = free_gpus.get()
    os.environ[VISIBLE] = gpu  # early enough: CUDA reads it when it is first used
    try:
        return work(*given)
    finally:
        free_gpus.put(gpu)


def _process_context() -> BaseContext:
    """Processes forked, where the system can, from one that has imported everything and run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval.engines", "torch._dynamo"])  # optimizers import the latter when they start
    return context
