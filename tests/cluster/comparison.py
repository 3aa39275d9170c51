"""The command of a small comparison, run as a person runs it, and what came out."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from cluster import slurm_here
from cluster.processes import wait_until
from tiny_eval import experiment

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARIES = ("ray", "submitit")
NOT_OF_THE_CELL = ("seconds", "train_seconds", "prepare_seconds", "pictures_seconds", "peak_memory_bytes")


def missing() -> str:
    """What has to be installed for these tests, in one line."""
    libraries = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    programs = slurm_here.missing_programs()
    needed = [f"pip install {' '.join(libraries)}"] if libraries else []
    return "; ".join([*needed, slurm_here.INSTALL] if programs else needed)


def write_settings(world: Path) -> Path:
    """The settings of a comparison in `tiny_eval`'s world, with trainings long enough to be hurt."""
    path = world / "comparison.yaml"
    methods = ["double_gsoft", "lora", "boft"]
    rates = {method: [1e-3] for method in methods}
    settings = experiment(world, subjects=["rex"], methods=methods, learning_rates=rates, max_train_steps=100)
    path.write_text(settings.to_yaml())
    return path


class Comparison:
    """One comparison in its folder."""

    def __init__(self, settings: Path, out: Path, engine: str) -> None:
        self.settings, self.out, self.engine = settings, out, engine

    def command(self, *more: object) -> list[str]:
        """Two cells at a time on one core each, unless `more` says otherwise."""
        words = ["-m", "eval.benchmark", self.settings, "--out", self.out, "--engine", self.engine]
        return [sys.executable, *map(str, [*words, "--workers", 2, "--cores", 1, *more])]

    def finish(self, *more: object) -> subprocess.CompletedProcess[str]:
        """Run the command to its end. AssertionError if it fails."""
        done = self.run(*more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def run(self, *more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*more), cwd=REPOSITORY, env=_environment(), capture_output=True, text=True)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """Inside the block the command runs, and a cell that trains is in work."""
        with (self.out.parent / "output.txt").open("a") as log:
            process = subprocess.Popen(self.command(), cwd=REPOSITORY, env=_environment(), stdout=log, stderr=log)
        try:
            wait_until(self.busy, "a cell that trains is in work")
            yield process
        finally:
            process.kill()
            process.wait()

    def busy(self) -> dict[str, psutil.Process]:
        """The processes that train for a cell, by its name."""
        found = {}
        for folder in (self.out / "work" / "scratch").glob("*"):
            cell, _, process = folder.name.rpartition(".")
            if (folder / "run").is_dir() and psutil.pid_exists(int(process)):
                found[cell.rpartition(".")[0]] = psutil.Process(int(process))
        return found

    def printed(self) -> str:
        """What the command printed inside `running`."""
        return (self.out.parent / "output.txt").read_text()

    def results(self) -> dict[str, dict[str, Any]]:
        """What results.jsonl has of every cell, but times and memory, by its name. AssertionError if one is twice."""
        lines = [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]
        names = [json.dumps(line["cell"]) for line in lines]
        assert len(set(names)) == len(names)
        return {
            name: {key: value for key, value in line.items() if key not in NOT_OF_THE_CELL}
            for name, line in zip(names, lines, strict=True)
        }

    def files(self) -> dict[str, bytes]:
        """Every picture of every cell, and the sheets."""
        found = [*self.out.glob("work/cells/*/*.png"), *self.out.glob("sheets/*")]
        return {path.relative_to(self.out).as_posix(): path.read_bytes() for path in found}

    def jobs(self) -> list[str]:
        """The numbers of the jobs that were given to Slurm."""
        return [path.name.removesuffix("_submitted.pkl") for path in self.out.glob("work/submitit/*_submitted.pkl")]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
