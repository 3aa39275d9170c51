"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.processes import Processes, free_ports, variables, wait_until

NODES = ("n1", "n2")  # the first one is the head
MEMORY = 100 * 2**20  # for objects, of which cells have none to speak of


class Ray(Processes):
    """Its programs."""

    def __init__(self, folder: Path, cores: int) -> None:
        super().__init__(folder)
        self.port, self.cores = free_ports(1)[0], cores

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_node(self, node: str) -> None:
        """Start one of `NODES`, or start it again."""
        head = ("--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false")
        self.start(
            Path(sys.executable).with_name("ray"),
            *("start", "--block", f"--num-cpus={self.cores}", f"--object-store-memory={MEMORY}"),
            *(head if node == NODES[0] else (f"--address={self.address}",)),
            node=node,
        )
        log = self.folder / f"ray-{node}.txt"
        wait_until(lambda: "Ray runtime started" in log.read_text(), f"Ray runs on {node}")


@contextmanager
def ray_cluster(cores: int = 1) -> Iterator[Ray]:
    """Inside the block, `ray.init()` finds a cluster of two nodes with so many cores each.

    Afterwards none of its processes is left.
    """
    with tempfile.TemporaryDirectory(prefix="ray-") as name:
        cluster = Ray(Path(name), cores)
        try:
            with variables(RAY_ADDRESS=cluster.address, RAY_USAGE_STATS_ENABLED="0", **cluster.mark):
                for node in NODES:
                    cluster.start_node(node)
                yield cluster
        finally:
            cluster.kill()
