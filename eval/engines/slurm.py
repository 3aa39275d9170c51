"""Cells as jobs of a Slurm cluster, through submitit.

The cells' folders say which cells are done, and `squeue` which jobs there still are. submitit itself follows jobs by
`sacct`. Where accounting is off, that knows nothing: submitit warns all the time, and waits for ever for a lost job.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from eval.cells import Cell
from eval.engines.worker import ATTEMPTS, Workers, attempt
from eval.experiment import Experiment
from eval.results import is_done, work_folder
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.files import whole_file

PAUSE = 2.0  # seconds between two looks at the queue
HOURS = 24  # that a job may take
LARGEST_ARRAY = 1000  # jobs: Slurm's own limit, MaxArraySize, is 1001 unless a cluster changes it
LOST = ("BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
FORGOTTEN = "no longer known to Slurm"  # some minutes after a job's end

Job = Any  # submitit's, which need not be installed


def run_on_slurm(experiment: Experiment, cells: Sequence[Cell], out: Path, workers: Workers) -> None:
    """As a job array on a Slurm cluster. What else Slurm is to know, it reads from `SBATCH_*`.

    After a failure no job is started. Cells whose jobs are lost with a process or node are submitted again, once the
    others have ended. Jobs of an earlier call that are still in the queue are waited for.

    experiment: the settings that all cells share. cells: what to run. out: the comparison's folder, which all nodes
    see. workers: cells at a time. Raises UserError if submitit or Slurm is missing, if Slurm refuses the jobs, if
    someone cancels one, or if a cell is lost too often, and what submitit makes of another failure.
    """
    jobs = _Jobs(out, workers)
    waiting = jobs.in_the_queue(cells)
    if waiting:
        print(f"{len(waiting)} of them are in Slurm's queue already", flush=True)
    later = [cell for cell in cells if cell not in waiting]
    lost: list[Cell] = []  # to be submitted again
    attempts = Counter(cells)
    try:
        with tqdm(total=len(cells), desc="cells", unit="cell") as progress:
            while waiting or lost or later:
                if not waiting:  # else arrays side by side would run more cells at a time than asked for
                    count = LARGEST_ARRAY - len(lost)
                    waiting = jobs.submit(experiment, [*lost, *later[:count]])
                    lost, later = [], later[count:]
                time.sleep(PAUSE)
                states = _states()
                if states is None:
                    progress.set_postfix_str("Slurm does not answer")
                    continue
                for cell, job in jobs.ended(waiting, states):
                    del waiting[cell]
                    state = states.get(job.job_id, FORGOTTEN)
                    if job.paths.result_pickle.exists():
                        if message := job.result():
                            raise UserError(message)
                    elif state == "CANCELLED":
                        raise UserError(f"{cell.id}: its job {job.job_id} was cancelled; the same command goes on")
                    elif not is_done(cell, out):
                        if attempts[cell] == ATTEMPTS:
                            raise UserError(_lost(cell, job, state))
                        attempts[cell] += 1
                        lost.append(cell)
                        continue
                    progress.set_postfix_str(cell.id)
                    progress.update()
    except KeyboardInterrupt:
        if waiting:
            print(
                f"Slurm goes on with {len(waiting)} cells, for which the same command waits; "
                f"to stop them: scancel {' '.join(_arrays(waiting.values()))}"
            )
        raise
    except Exception:
        if waiting:
            subprocess.run(["scancel", "--state=PENDING", *_arrays(waiting.values())], check=False)
        raise


class _Jobs:
    """What submitit has in `work/submitit`, and a file there that says which job is for which cell."""

    def __init__(self, out: Path, workers: Workers) -> None:
        """Raises UserError if submitit or Slurm is missing."""
        try:
            import submitit
        except ImportError as error:
            raise UserError("--engine submitit needs a library: pip install submitit") from error
        if not shutil.which("sbatch"):  # submitit would start all cells here at once
            raise UserError("--engine submitit: there is no Slurm here; leave it out to use this machine")
        self._library = submitit
        self._out, self._cores = out.resolve(), workers.cores
        self._folder = work_folder(self._out) / "submitit"
        self._file = self._folder / "jobs.json"
        self._executor = submitit.AutoExecutor(folder=self._folder)
        self._executor.update_parameters(
            timeout_min=HOURS * 60,
            cpus_per_task=workers.cores,
            slurm_srun_args=[
                f"--cpus-per-task={workers.cores}"
            ],  # srun does not take it from the job since Slurm 22.05
            slurm_array_parallelism=workers.number,
            name="gsoft-benchmark",
            **({"gpus_per_node": 1} if torch.cuda.is_available() else {}),
        )

    def in_the_queue(self, cells: Iterable[Cell]) -> dict[Cell, Job]:
        """The jobs for these cells that have not ended."""
        ids = self._ids()
        jobs: dict[Cell, Job] = {
            cell: self._library.SlurmJob(self._folder, ids[cell.id]) for cell in cells if cell.id in ids
        }
        if not jobs:
            return {}
        states = _states()
        if states is None:
            raise UserError("--engine submitit: squeue does not answer; try again when Slurm runs")
        ended = {cell for cell, _ in self.ended(jobs, states)}
        return {cell: job for cell, job in jobs.items() if cell not in ended}

    def submit(self, experiment: Experiment, cells: Sequence[Cell]) -> dict[Cell, Job]:
        """One job for each of them, no more than `LARGEST_ARRAY`. Raises UserError if Slurm refuses."""
        if not cells:
            return {}
        count = len(cells)
        said = io.StringIO()  # what sbatch says of an error, which the error has as well
        try:
            with redirect_stderr(said):
                jobs = self._executor.map_array(
                    attempt, [experiment] * count, cells, [self._out] * count, [self._cores] * count
                )
        except self._library.core.utils.FailedJobError as error:
            raise UserError(f"--engine submitit: Slurm refuses the jobs: {first_line(error)}") from error
        ids = self._ids() | {cell.id: job.job_id for cell, job in zip(cells, jobs, strict=True)}
        with whole_file(self._file) as file:
            file.write(json.dumps(ids, indent=1).encode())
        return dict(zip(cells, jobs, strict=True))

    def ended(self, jobs: dict[Cell, Job], states: dict[str, str]) -> list[tuple[Cell, Job]]:
        """Those with a result, or whose state says that none will come.

        jobs: some of these. states: of all that Slurm knows, asked for before this call. A job that is completed has
        written its result, which other machines may see somewhat later.
        """
        written = {path.name for path in self._folder.iterdir()}

        def has_ended(job: Job) -> bool:
            state = states.get(job.job_id, FORGOTTEN)
            return job.paths.result_pickle.name in written or state in (*LOST, "CANCELLED", FORGOTTEN)

        return [(cell, job) for cell, job in jobs.items() if has_ended(job)]

    def _ids(self) -> dict[str, str]:
        return json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}


def _states() -> dict[str, str] | None:
    """The state of every job of this user that Slurm remembers; None if it does not answer."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i %T"]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else dict(line.split() for line in done.stdout.splitlines())


def _arrays(jobs: Iterable[Job]) -> list[str]:
    """The numbers by which scancel knows the arrays of these jobs."""
    return list(dict.fromkeys(job.job_id.split("_")[0] for job in jobs))


def _lost(cell: Cell, job: Job, state: str) -> str:
    return (
        f"{cell.id}: its job was lost {ATTEMPTS} times ({job.job_id} was the last, {state}); "
        f"{job.paths.stderr} may say why"
    )
