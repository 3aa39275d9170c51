"""A small world to compare methods in, and a comparison that is finished there."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_eval import experiment, grid, write_world

from eval import engines
from eval.benchmark import run_benchmark
from eval.experiment import Experiment
from eval.methods import METHODS
from eval.run_cell import run_cell


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def in_process(monkeypatch):
    """Cells run here, one after the other; returns the ids of those that ran."""
    ran: list[str] = []

    def run_here(experiment, cells, out, workers):
        for each in cells:
            run_cell(experiment, each, out)
            ran.append(each.id)

    monkeypatch.setitem(engines.ENGINES, "local", run_here)
    return ran


def finish(comparison: Experiment, out: Path) -> Path:
    """Run a comparison in this process; returns its output folder."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(
            engines.ENGINES, "local", lambda e, cells, out, workers: [run_cell(e, c, out) for c in cells]
        )
        run_benchmark(comparison, out)
    return out


@pytest.fixture(scope="session")
def finished_grid(world, tmp_path_factory) -> Path:
    """The output folder of a finished grid. Read only."""
    return finish(grid(world), tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory) -> Path:
    """The output folder of a finished comparison. Read only."""
    return finish(experiment(world, methods=list(METHODS), curve_every=1), tmp_path_factory.mktemp("out"))
