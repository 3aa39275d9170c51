"""A Slurm of two nodes on this machine, made of Debian's programs. It touches nothing outside of its folder."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.processes import Processes, free_ports, variables, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
INSTALL = "apt-get install munge slurmctld slurmd slurm-client"
NODES = ("n1", "n2")

CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
SchedulerParameters=sched_interval=5,batch_sched_delay=0
PartitionName=all Nodes=ALL Default=YES State=UP
"""
A_NODE = "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} State=UNKNOWN\n"


def missing_programs() -> list[str]:
    """Those of `PROGRAMS` that are not installed."""
    return [name for name in PROGRAMS if not _find(name)]


class Slurm(Processes):
    """Its programs."""

    def start_node(self, node: str) -> None:
        """Start one of `NODES`, or start it again."""
        self.start(_find("slurmd"), "-D", "-N", node, node=node)


@contextmanager
def slurm(cores: int = 1) -> Iterator[Slurm]:
    """Inside the block, sbatch and the like find a cluster of two nodes with so many cores each.

    Afterwards none of its processes is left, nor of its jobs.
    """
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        cluster = Slurm(folder)
        try:
            with variables(SLURM_CONF=str(_configure(folder, cores)), **cluster.mark):
                cluster.start(*_munged(folder))
                wait_until((folder / "munge.socket").exists, "munged answers")
                cluster.start(_find("slurmctld"), "-D", "-i")
                for node in NODES:
                    cluster.start_node(node)
                wait_until(lambda: _idle() == len(NODES), "both nodes are idle")
                yield cluster
        finally:
            cluster.kill()


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")  # not on everybody's path


def _configure(folder: Path, cores: int) -> Path:
    control, *ports = free_ports(1 + len(NODES))
    host = socket.gethostname().split(".")[0]
    (folder / "state").mkdir()
    text = CONFIGURATION.format(host=host, control=control, user=getpass.getuser(), folder=folder)
    text += "".join(
        A_NODE.format(node=node, host=host, port=port, cores=cores) for node, port in zip(NODES, ports, strict=True)
    )
    (folder / "slurm.conf").write_text(text)
    return folder / "slurm.conf"


def _munged(folder: Path) -> list[object]:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    places = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    places |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    return [_find("munged"), "--foreground", "--force", *(f"--{name}={path}" for name, path in places.items())]


def _idle() -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    return len(subprocess.run(command, capture_output=True, text=True).stdout.split())
