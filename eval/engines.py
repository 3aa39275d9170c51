"""Engines that run cells: processes on this machine, Slurm, or Ray.

Every engine takes the same four things and returns when all cells are done. A cell runs in a process of its own, so
that its peak memory is its own and nothing is left behind.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from tqdm.auto import tqdm

from eval.cell import run_cell
from eval.experiment import Cell, Experiment
from eval.results import work_folder
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.hub_access import stay_offline


def run_locally(experiment: Experiment, cells: Sequence[Cell], out: Path, workers: int) -> None:
    """On this machine, so many cells at a time, each with its share of the cores. After a failure none is started.

    experiment: the settings that all cells share. cells: what to run. out: the comparison's folder. workers: cells at a
    time. The hub is not asked again for what is in its cache on this machine by now. Raises what a cell raised.
    """
    threads = _cores_each(workers)
    context = _process_context()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (threads,), max_tasks_per_child=1)
    try:
        jobs = {pool.submit(run_quietly, experiment, cell, out): cell for cell in cells}
        with tqdm(total=len(cells), desc="cells", unit="cell") as progress:
            for job in as_completed(jobs):
                job.result()
                progress.set_postfix_str(jobs[job].id)
                progress.update()
    finally:
        pool.shutdown(cancel_futures=True)  # what is running ends first, its result is not lost


def run_with_submitit(experiment: Experiment, cells: Sequence[Cell], out: Path, workers: int) -> None:
    """As a job array on a Slurm cluster. What else Slurm is to know, it reads from `SBATCH_*`.

    experiment: the settings that all cells share. cells: what to run. out: the comparison's folder, which all nodes
    see. workers: cells at a time. Raises UserError if submitit or Slurm is missing, and what submitit makes of a cell's
    failure.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--engine submitit needs a library: pip install submitit") from error
    if not shutil.which("sbatch"):  # submitit would start all cells here at once
        raise UserError("--engine submitit: there is no Slurm here; leave it out to use this machine")
    executor = submitit.AutoExecutor(folder=work_folder(out) / "submitit")
    executor.update_parameters(
        timeout_min=24 * 60,
        gpus_per_node=int(torch.cuda.is_available()),
        slurm_array_parallelism=workers,
        name="gsoft-benchmark",
    )
    jobs = executor.map_array(run_cell, [experiment] * len(cells), cells, [out] * len(cells))
    for job in tqdm(jobs, desc="cells", unit="cell"):
        job.result()


def run_with_ray(experiment: Experiment, cells: Sequence[Cell], out: Path, workers: int) -> None:
    """On a Ray cluster, or this machine if there is none; one GPU a cell where there are GPUs.

    experiment: the settings that all cells share. cells: what to run. out: the comparison's folder, which all nodes
    see. workers: cells at a time where there is no GPU. Raises UserError if Ray is missing, and what Ray makes of a
    cell's failure.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs a library: pip install ray") from error
    ray.init(ignore_reinit_error=True)
    gpus = ray.cluster_resources().get("GPU", 0)
    options = {"num_gpus": 1} if gpus else {"num_cpus": _cores_each(workers)}
    remote = ray.remote(max_calls=1, **options)(run_cell)  # max_calls: a fresh process for every cell
    waiting = [remote.remote(experiment, cell, out) for cell in cells]
    with tqdm(total=len(cells), desc="cells", unit="cell") as progress:
        while waiting:
            done, waiting = ray.wait(waiting)
            ray.get(done)
            progress.update(len(done))


ENGINES: dict[str, Callable[[Experiment, Sequence[Cell], Path, int], None]] = {
    "local": run_locally,
    "submitit": run_with_submitit,
    "ray": run_with_ray,
}


def run_quietly(experiment: Experiment, cell: Cell, out: Path) -> None:
    """`run_cell` with what it prints in `work/logs/<id>.txt` instead of on the terminal, where workers would mix.

    experiment, cell, out: as there, and so the errors.
    """
    log = work_folder(out) / "logs" / f"{cell.id}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = file
        try:
            run_cell(experiment, cell, out)
        finally:
            sys.stdout, sys.stderr = before


def _process_context() -> BaseContext:
    """Processes forked, where the system can, from one that has imported everything and run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eval.engines", "torch._dynamo"])  # optimizers import the latter when they start
    return context


def _cores_each(workers: int) -> int:
    """Cores for one of `workers` cells at a time, of those that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    stay_offline()
