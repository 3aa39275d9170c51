"""Cells on Ray and on Slurm are those of this machine to the bit, whatever is lost meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from cluster.processes import wait_until
from tiny_eval import experiment

from eval.cells import Cell
from eval.engines import ENGINES, ray_cluster, slurm
from eval.engines.worker import ATTEMPTS, Workers
from gsoft_diffusion import UserError

CELL = Cell("base", None, None, "rex", 0)
CELLS = 4  # of the comparison


def assert_same(comparison, local):
    assert comparison.results() == local.results()
    assert comparison.files() == local.files()
    assert len(local.results()) == CELLS
    assert any(name.endswith(".png") for name in local.files())


def test_the_cluster_gives_the_local_results_to_the_bit(comparison, local):
    done = comparison.finish()
    assert_same(comparison, local)
    assert "sacct" not in done.stdout + done.stderr
    assert f"{CELLS - 1}/{CELLS - 1}" in done.stderr  # the bar


def test_a_killed_process_and_a_lost_node_lose_no_cell(comparison, local, cluster):
    with comparison.running() as command:
        next(iter(comparison.busy().values())).kill()
        wait_until(lambda: set(cluster.alive("n2")) & set(comparison.busy().values()), "n2 has a cell in work")
        cluster.kill("n2")
        try:
            assert command.wait() == 0, comparison.printed()
        finally:
            cluster.start_node("n2")
    assert_same(comparison, local)


def test_a_command_that_is_killed_and_given_again_goes_on(comparison, local, engine):
    with comparison.running() as command:
        command.kill()
    done = comparison.finish()
    assert_same(comparison, local)
    if engine == "submitit":  # jobs outlive the command: none is submitted twice
        assert "of them are in Slurm's queue already" in done.stdout
        assert len(comparison.jobs()) == CELLS


def test_ctrl_c_says_how_to_go_on(comparison, engine):
    if engine != "submitit":
        pytest.skip("Ray ends its tasks with the command")
    with comparison.running() as command:
        command.send_signal(signal.SIGINT)
        assert command.wait() == 130, comparison.printed()
    said = comparison.printed()
    assert "for which the same command waits; to stop them: scancel" in said
    subprocess.run(["scancel", *comparison.jobs()], check=True)


def test_more_cores_than_a_node_has_are_refused(comparison):
    done = comparison.run("--cores", 2)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert "no node of the Ray cluster has 2 cores; give fewer" in last or "Slurm refuses the jobs" in last


@pytest.fixture
def run_cells(engine, cluster, tmp_path):
    """The engine by itself, in this process."""
    yield lambda settings, cells: ENGINES[engine](settings, cells, tmp_path, Workers(2, 1))
    if engine == "ray":
        sys.modules["ray"].shutdown()


def test_after_a_mistake_no_cell_is_started(run_cells, settings, tmp_path):
    broken = replace(experiment(settings.parent), pretrained_model_name_or_path="./nowhere")
    cells = [replace(CELL, seed=seed) for seed in range(6)]
    with pytest.raises(UserError, match=r"no model folder \./nowhere"):
        run_cells(broken, cells)
    assert len(list((tmp_path / "work" / "logs").iterdir())) < len(cells)


def test_a_job_that_someone_cancels_ends_the_command_in_one_line(run_cells, engine, settings, tmp_path):
    if engine != "submitit":
        pytest.skip("Ray has no queue of jobs")
    jobs = tmp_path / "work" / "submitit" / "jobs.json"

    def cancel() -> None:
        wait_until(jobs.exists, "jobs are in the queue")
        subprocess.run(["scancel", *json.loads(jobs.read_text()).values()], check=True)

    with ThreadPoolExecutor(1) as someone:
        cancelled = someone.submit(cancel)
        with pytest.raises(UserError, match=r"its job \d+ was cancelled; the same command goes on"):
            run_cells(experiment(settings.parent), [CELL])
        cancelled.result()


def test_a_cell_that_is_lost_again_and_again_is_named(run_cells, settings, monkeypatch):
    def die(*given):
        os.kill(os.getpid(), signal.SIGKILL)

    for module in (ray_cluster, slurm):
        monkeypatch.setattr(module, "attempt", die)
    with pytest.raises(UserError, match=f"base--rex--seed0: its (process|job) was lost {ATTEMPTS} times"):
        run_cells(experiment(settings.parent), [CELL])
