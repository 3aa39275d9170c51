"""Training runs in processes of their own, to be hurt, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.command_line import run
from gsoft_diffusion.training.train import train

TESTS = Path(__file__).resolve().parent
HANG = 120  # seconds after which a run that should have ended counts as hanging

Fault = Callable[[], None]  # run in the child before training; must be picklable


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status (minus the number of the signal that killed it) and what it printed."""

    status: int
    output: str


def start(
    config: TrainingConfig, log: Path, fault: Fault | None = None, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Start training in a new process that prints into `log`."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}  # what the fork server starts with
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gsoft_diffusion.training.train", "child_runs", "tensorboard"])
    process = context.Process(target=_child, args=(config, log, fault, environment or {}))
    process.start()
    return process


def finish(process: BaseProcess, log: Path) -> Outcome:
    """Wait for the process. AssertionError if it hangs."""
    process.join(HANG)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"hangs; it printed: {log.read_text()}")
    return Outcome(process.exitcode, log.read_text())


def train_in_child(config: TrainingConfig, log: Path, fault: Fault | None = None) -> Outcome:
    return finish(start(config, log, fault), log)


def train_in_ranks(config: TrainingConfig, folder: Path, faults: Sequence[Fault | None]) -> list[Outcome]:
    """One run of as many processes as there are faults, as a launcher would start them, without a launcher's care."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": len(faults), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    folder.mkdir(exist_ok=True)
    logs = [folder / f"rank-{rank}.log" for rank in range(len(faults))]
    processes = []
    for rank, (log, fault) in enumerate(zip(logs, faults, strict=True)):
        environment = common | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": len(faults)}
        processes.append(start(config, log, fault, {name: str(value) for name, value in environment.items()}))
    try:
        return [finish(process, log) for process, log in zip(processes, logs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def _child(config: TrainingConfig, log: Path, fault: Fault | None, environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= environment
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)

    def main() -> int:
        if fault is not None:
            fault()
        return 130 if train(config).interrupted else 0

    try:
        run(main)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))  # not by multiprocessing's ways, which a hurt process may have no permission for
