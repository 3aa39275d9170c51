"""Processes of a cluster: found by a variable that all of them inherit, so that none is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

CLUSTER, NODE = "GSOFT_TEST_CLUSTER", "GSOFT_TEST_NODE"
STEP = "slurmstepd"  # the parent of a job's processes, which writes its title over its own variables
PATIENCE = 240  # seconds for what should happen soon


class Processes:
    """The programs of one cluster, and what they started."""

    def __init__(self, folder: Path) -> None:
        """folder: for what they print; its name is the cluster's."""
        self.folder = folder
        self.mark = {CLUSTER: str(folder)}
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: object, node: str | None = None) -> None:
        """Start a program that stays, with what it prints in a file of its name."""
        name = f"{Path(str(command[0])).name}-{node or 'all'}.txt"
        with (self.folder / name).open("a") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                env=os.environ | self.mark | ({NODE: node} if node else {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)

    def alive(self, node: str | None = None) -> list[psutil.Process]:
        """All of them, or those of one node: its programs, and what Slurm started there for a job."""
        found = set()
        for process in psutil.process_iter():
            environment = _environment(process)
            of_the_node = node is None or node in (environment.get(NODE), environment.get("SLURMD_NODENAME"))
            if self.mark.items() <= environment.items() and of_the_node:
                found |= {process, *_step_of(process)}
        return list(found)

    def kill(self, node: str | None = None) -> None:
        """End them at once, as a machine does that loses its power. AssertionError if one does not end."""

        def none_left() -> bool:
            for process in (found := self.alive(node)):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            for process in self._started:
                process.poll()
            return not found

        wait_until(none_left, "processes end")


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except psutil.Error:
        return {}


def _step_of(process: psutil.Process) -> list[psutil.Process]:
    """Slurm's process that watches this one; nothing if it is none of a job."""
    try:
        parent = process.parent()
        return [parent] if parent and parent.name() == STEP else []
    except psutil.Error:
        return []


def wait_until(is_so: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Look until it is so. AssertionError if it is not in time."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"waited {seconds} seconds until {what}"
        time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nobody uses."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Inside the block, this process and those that it starts have these environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
