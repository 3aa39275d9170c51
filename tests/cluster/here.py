"""Run a command where clusters of this machine are found, and end the clusters afterwards.

python tests/cluster/here.py --engines ray submitit -- python -m benchmarks.engines
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.ray_here import ray_cluster
from cluster.slurm_here import slurm

CLUSTERS = {"ray": ray_cluster, "submitit": slurm}


def main() -> int:
    """Run the command line. Returns the command's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=CLUSTERS, required=True, help="whose clusters to start")
    parser.add_argument("command", nargs="+", help="after --: what to run")
    args = parser.parse_args()
    with ExitStack() as clusters:
        for engine in args.engines:
            clusters.enter_context(CLUSTERS[engine]())
        return subprocess.run(args.command, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
