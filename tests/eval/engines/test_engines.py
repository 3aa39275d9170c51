"""Where cells run: on this machine; of clusters, what is said where there is none. On real ones: `tests/cluster`."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from tiny_eval import experiment

from eval import benchmark
from eval.benchmark import run_benchmark
from eval.cells import Cell
from eval.engines import ENGINES, local, slurm, worker
from eval.engines.worker import Workers, attempt, cores_each
from eval.results import all_results, is_done
from gsoft_diffusion import UserError

BASE = Cell("base", None, None, "rex", 0)


def test_clusters_that_are_not_installed_say_so(world, tmp_path, monkeypatch):
    for name in ("submitit", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"pip install {name}"):
            run_benchmark(experiment(world), tmp_path, engine=name)


def test_submitit_is_refused_where_there_is_no_slurm(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", ModuleType("submitit"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="there is no Slurm here"):
        run_benchmark(experiment(world), tmp_path, engine="submitit")


class Executor:
    """submitit's, on a cluster that finishes every array at once."""

    def __init__(self, folder):
        self.folder, self.arrays = Path(folder), []
        self.folder.mkdir(parents=True)

    def update_parameters(self, **parameters):
        pass

    def map_array(self, function, experiments, cells, outs, cores):
        self.arrays.append(len(cells))
        names = [f"{len(self.arrays)}_{place}" for place in range(len(cells))]
        results = [self.folder / f"{name}_0_result.pkl" for name in names]
        for result in results:
            result.touch()
        return [
            SimpleNamespace(job_id=name, paths=SimpleNamespace(result_pickle=result), result=lambda: None)
            for name, result in zip(names, results, strict=True)
        ]


def test_slurm_gets_arrays_that_it_takes_one_after_the_other(world, tmp_path, monkeypatch):
    executors = []
    library = ModuleType("submitit")
    library.AutoExecutor = lambda folder: executors.append(Executor(folder)) or executors[-1]
    library.core = SimpleNamespace(utils=SimpleNamespace(FailedJobError=OSError))
    monkeypatch.setitem(sys.modules, "submitit", library)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=""))
    monkeypatch.setattr(slurm, "PAUSE", 0)
    monkeypatch.setattr(slurm, "LARGEST_ARRAY", 2)
    cells = [replace(BASE, seed=seed) for seed in range(5)]
    slurm.run_on_slurm(experiment(world), cells, tmp_path, Workers(8, 1))
    assert executors[0].arrays == [2, 2, 1]


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert [cores_each(workers) for workers in (1, 2, 3, 9)] == [8, 4, 2, 1]


@pytest.mark.parametrize(("cores", "expected"), [(None, 4), (3, 3)])
def test_cells_get_the_cores_that_are_asked_for(world, tmp_path, monkeypatch, cores, expected):
    class HereError(Exception):
        pass

    def engine(experiment, cells, out, workers):
        assert workers == Workers(2, expected)
        raise HereError

    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setitem(ENGINES, "local", engine)
    with pytest.raises(HereError):
        run_benchmark(experiment(world), tmp_path, workers=2, cores=cores)


@pytest.mark.parametrize("flag", ["--workers", "--cores"])
def test_less_than_one_is_refused(flag, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["benchmark", "eval/experiments/own.yaml", "--out", str(tmp_path), flag, "0"])
    with pytest.raises(UserError, match=f"{flag} 0: must be 1 or more"):
        benchmark.main()


def test_an_attempt_computes_on_its_cores_and_prints_into_its_log(world, tmp_path, capfd, monkeypatch):
    before = torch.get_num_threads()
    try:
        assert attempt(experiment(world), BASE, tmp_path, before + 1) is None
    finally:
        torch.set_num_threads(before)
    assert all_results(tmp_path)[BASE]["threads"] == before + 1
    monkeypatch.setattr(worker, "run_cell", lambda *given: print("on with it"))
    attempt(experiment(world), BASE, tmp_path, before)
    assert "on with it" not in capfd.readouterr().out
    assert (tmp_path / "work" / "logs" / f"{BASE.id}.txt").read_text() == "on with it\n"


def test_an_attempt_returns_what_concerns_all_cells_and_raises_the_rest(world, tmp_path, monkeypatch):
    broken = replace(experiment(world), pretrained_model_name_or_path="./nowhere")
    assert "no model folder ./nowhere" in attempt(broken, BASE, tmp_path, torch.get_num_threads())

    def fail(*given):
        raise ValueError("a fault of ours")

    monkeypatch.setattr(worker, "run_cell", fail)
    with pytest.raises(ValueError, match="a fault of ours"):
        attempt(broken, BASE, tmp_path, torch.get_num_threads())


def test_local_workers_do_not_ask_the_hub(world, tmp_path, monkeypatch):
    seen = []

    class Threads(ThreadPoolExecutor):
        def __init__(self, number, context, initializer, max_tasks_per_child):
            super().__init__(number, initializer=initializer)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(local, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(local, "end_with_parent", lambda: None)  # threads have none
    monkeypatch.setattr(local, "attempt", lambda *given: seen.append(huggingface_hub.is_offline_mode()))
    local.run_locally(experiment(world), [BASE], tmp_path, Workers(1, 1))
    assert seen == [True]


@pytest.mark.slow
def test_after_a_failure_no_cell_is_started(world, tmp_path):
    broken = Cell("double_gsoft", "medium", 1e-3, "rex", 0)
    cells = [broken, *(replace(broken, seed=seed) for seed in range(1, 6))]
    settings = replace(experiment(world), pretrained_model_name_or_path="./nowhere")
    with pytest.raises(UserError, match="no model folder"):
        local.run_locally(settings, cells, tmp_path, Workers(1, 1))
    assert len(list((tmp_path / "work" / "logs").iterdir())) < len(cells)


@pytest.mark.slow
def test_local_workers_run_cells_in_processes(world, tmp_path):
    cells = [BASE, replace(BASE, subject="cup")]
    local.run_locally(experiment(world), cells, tmp_path, Workers(2, 1))
    assert all(is_done(each, tmp_path) for each in cells)
    assert len(list((tmp_path / "work" / "logs").iterdir())) == 2
    assert benchmark.mean_seconds(all_results(tmp_path)).keys() == {"base"}


@pytest.mark.slow
def test_a_killed_process_is_one_line_and_the_next_call_goes_on(world, tmp_path):
    def kill_the_first() -> None:
        while not (found := list((tmp_path / "work" / "scratch").glob("*"))):
            time.sleep(0.05)
        psutil.Process(int(found[0].name.rpartition(".")[2])).kill()

    killer = threading.Thread(target=kill_the_first, daemon=True)
    killer.start()
    with pytest.raises(UserError, match="the process of a cell was killed, perhaps because memory ran out"):
        local.run_locally(experiment(world), [BASE], tmp_path, Workers(1, 1))
    killer.join()
    assert not is_done(BASE, tmp_path)
    local.run_locally(experiment(world), [BASE], tmp_path, Workers(1, 1))
    assert is_done(BASE, tmp_path)
