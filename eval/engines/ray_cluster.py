"""Cells as tasks of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from eval.cells import Cell
from eval.engines.worker import ATTEMPTS, Workers, attempt
from eval.experiment import Experiment
from gsoft_diffusion.foundation.errors import UserError, first_line

PATIENCE = 5.0  # seconds without news before the bar says why


def run_on_ray(experiment: Experiment, cells: Sequence[Cell], out: Path, workers: Workers) -> None:
    """On a Ray cluster, or this machine if there is none; one GPU a cell where there are GPUs.

    After a failure no cell is started. Ray runs a cell again, elsewhere if need be, if its process or its node is lost.

    experiment: the settings that all cells share. cells: what to run. out: the comparison's folder, which all nodes
    see. workers: cells at a time. Raises UserError if Ray is missing, if no node has so many cores, or if a cell is
    lost too often, and what Ray makes of another failure.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs a library: pip install ray") from error
    if not ray.is_initialized():  # it is, if other cells of the comparison ran before
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    needs = {"CPU": workers.cores, "GPU": int(ray.cluster_resources().get("GPU", 0) > 0)}
    if not _has_room(needs):
        raise UserError(f"--cores {workers.cores}: no node of the Ray cluster has {_in_words(needs)}; give fewer")
    # max_calls: a fresh process for every cell
    remote = ray.remote(max_calls=1, max_retries=ATTEMPTS - 1, num_cpus=needs["CPU"], num_gpus=needs["GPU"])(attempt)
    waiting = list(reversed(cells))
    running: dict[Any, Cell] = {}
    failure: Exception | None = None
    with tqdm(total=len(cells), desc="cells", unit="cell") as progress:
        while running or (waiting and not failure):
            while waiting and not failure and len(running) < workers.number:
                cell = waiting.pop()
                running[remote.remote(experiment, cell, out.resolve(), workers.cores)] = cell
            done, _ = ray.wait(list(running), timeout=PATIENCE)
            if not done and not _has_room(needs):
                progress.set_postfix_str(f"waiting for a node with {_in_words(needs)}")
            for job in done:
                cell = running.pop(job)
                failure = _failure(job, cell) or failure
                progress.set_postfix_str(cell.id)
                progress.update(not failure)
    if failure:
        raise failure  # what was running has ended, its result is not lost


def _failure(job: Any, cell: Cell) -> Exception | None:
    """What went wrong with a cell that ended; None if nothing did."""
    import ray

    try:
        message = ray.get(job)
    except ray.exceptions.RayTaskError as error:
        return error
    except ray.exceptions.OutOfMemoryError as error:
        message = (
            f"{cell.id}: Ray ended its process, since its node's memory was full ({first_line(error)}); give fewer "
            "--workers or more --cores, so that fewer cells share a node. The same command goes on"
        )
    except ray.exceptions.RayError as error:  # of a process or a node
        message = (
            f"{cell.id}: its process was lost {ATTEMPTS} times ({first_line(error)}); is there memory enough? The same "
            "command goes on with the cells that are missing"
        )
    return UserError(message) if message else None


def _has_room(needs: dict[str, int]) -> bool:
    """Whether a node that is alive could run a cell, if nothing else ran there."""
    import ray

    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(name, 0) >= number for name, number in needs.items()) for node in nodes)


def _in_words(needs: dict[str, int]) -> str:
    cores = f"{needs['CPU']} core{'s' * (needs['CPU'] > 1)}"
    return f"{cores} and a GPU" if needs["GPU"] else cores
