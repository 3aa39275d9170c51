"""Where cells run: on this machine; of clusters, what is said where there is none. On real ones: `tests/cluster`."""

from __future__ import annotations

import os
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
from eval.plan import mean_seconds
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


class Cluster:
    """Slurm and submitit, where jobs end as `fates` says: those of each cell, by its seed; "" is a result.

    At each look at the queue the first job that still runs ends.
    """

    def __init__(self, monkeypatch, out, fates=None):
        self.out, self.fates, self.arrays, self.looks = out, fates or {}, [], 0
        self.jobs, self.unanswered, self.cancelled, self.interrupt = {}, 0, [], None
        library = ModuleType("submitit")
        library.AutoExecutor = self.executor
        library.SlurmJob = lambda folder, job_id: self.job(Path(folder), job_id)
        library.core = SimpleNamespace(utils=SimpleNamespace(FailedJobError=OSError))
        monkeypatch.setitem(sys.modules, "submitit", library)
        monkeypatch.setattr("shutil.which", lambda name: name)
        monkeypatch.setattr(subprocess, "run", self.command)
        monkeypatch.setattr(slurm, "PAUSE", 0)

    def executor(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(update_parameters=lambda **given: None, map_array=self.map_array)

    def map_array(self, function, experiments, cells, outs, cores):
        self.arrays.append(len(cells))
        names = [f"{len(self.arrays)}_{place}" for place in range(len(cells))]
        for name, cell in zip(names, cells, strict=True):
            fates = self.fates.get(cell.seed, [""])
            self.jobs[name] = [fates.pop(0) if len(fates) > 1 else fates[0], "RUNNING"]
        return [self.job(self.folder, name) for name in names]

    def job(self, folder, name):
        paths = SimpleNamespace(result_pickle=folder / f"{name}_0_result.pkl", stderr=folder / f"{name}_log.err")
        return SimpleNamespace(job_id=name, paths=paths, result=lambda: None)

    def command(self, command, **options):
        if command[0] == "scancel":
            self.cancelled += command[1:]
            return SimpleNamespace(returncode=0, stdout="")
        if self.interrupt == len(self.jobs):
            raise KeyboardInterrupt
        if self.unanswered:
            self.unanswered -= 1
            return SimpleNamespace(returncode=1, stdout="")
        for name, job in self.jobs.items():
            fate, state = job
            if state == "RUNNING":
                job[1] = fate or "COMPLETED"
                if not fate:
                    (self.folder / f"{name}_0_result.pkl").touch()
                break
        known = [f"{name} {state}" for name, (_, state) in self.jobs.items() if state != "FORGOTTEN"]
        return SimpleNamespace(returncode=0, stdout="\n".join(known))


class TestSlurm:
    CELLS = tuple(replace(BASE, seed=seed) for seed in range(5))

    def run(self, world, out, count=5):
        slurm.run_on_slurm(experiment(world), self.CELLS[:count], out, Workers(8, 1))

    def test_gets_arrays_that_it_takes_one_after_the_other(self, world, tmp_path, monkeypatch):
        cluster = Cluster(monkeypatch, tmp_path)
        monkeypatch.setattr(slurm, "LARGEST_ARRAY", 2)
        self.run(world, tmp_path)
        assert cluster.arrays == [2, 2, 1]

    @pytest.mark.parametrize("fate", ["NODE_FAIL", "OUT_OF_MEMORY", "FORGOTTEN"])
    def test_a_cell_whose_job_is_lost_comes_again_when_the_others_have_ended(self, world, tmp_path, monkeypatch, fate):
        cluster = Cluster(monkeypatch, tmp_path, {0: [fate, fate, ""], 2: [fate, ""]})
        self.run(world, tmp_path)
        assert cluster.arrays == [5, 2, 1]

    def test_one_that_is_lost_again_and_again_ends_the_command(self, world, tmp_path, monkeypatch):
        cluster = Cluster(monkeypatch, tmp_path, {1: ["TIMEOUT"]})
        message = r"seed1: its job was lost 3 times \(3_0 was the last, TIMEOUT\); .*3_0_log"
        with pytest.raises(UserError, match=message):
            self.run(world, tmp_path, 3)
        assert cluster.arrays == [3, 1, 1]

    def test_one_that_wrote_its_cell_before_it_was_lost_is_done(self, world, tmp_path, monkeypatch):
        cluster = Cluster(monkeypatch, tmp_path, {0: ["NODE_FAIL"]})
        monkeypatch.setattr(slurm, "is_done", lambda cell, out: cell.seed == 0)
        self.run(world, tmp_path, 2)
        assert cluster.arrays == [2]

    def test_a_cancelled_job_ends_the_command_and_those_that_wait(self, world, tmp_path, monkeypatch):
        cluster = Cluster(monkeypatch, tmp_path, {0: ["CANCELLED"]})
        with pytest.raises(UserError, match=r"seed0: its job 1_0 was cancelled; the same command goes on"):
            self.run(world, tmp_path, 3)
        assert cluster.cancelled == ["--state=PENDING", "1"]

    def test_slurm_may_be_silent_for_a_while(self, world, tmp_path, monkeypatch, capfd):
        cluster = Cluster(monkeypatch, tmp_path)
        cluster.unanswered = 2
        self.run(world, tmp_path, 2)
        assert cluster.arrays == [2]
        assert "Slurm does not answer" in capfd.readouterr().err

    def test_jobs_of_an_interrupted_command_are_waited_for(self, world, tmp_path, monkeypatch, capfd):
        cluster = Cluster(monkeypatch, tmp_path)
        cluster.interrupt = 3  # jobs are in the queue
        with pytest.raises(KeyboardInterrupt):
            self.run(world, tmp_path, 3)
        assert "Slurm goes on with 3 cells" in capfd.readouterr().out
        cluster.interrupt = None
        slurm.run_on_slurm(experiment(world), self.CELLS[1:], tmp_path, Workers(8, 1))  # the first is done by now
        assert cluster.arrays == [3, 2]
        assert "2 of them are in Slurm's queue already" in capfd.readouterr().out


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
        def __init__(self, number, context, initializer, initargs, max_tasks_per_child):
            super().__init__(number, initializer=initializer, initargs=initargs)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(local, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(local, "end_with_parent", lambda: None)  # threads have none
    monkeypatch.setattr(local, "attempt", lambda *given: seen.append(huggingface_hub.is_offline_mode()))
    local.run_locally(experiment(world), [BASE], tmp_path, Workers(1, 1))
    assert seen == [True]


@pytest.mark.parametrize(
    ("count", "chosen", "expected"),
    [(0, None, []), (2, None, ["0", "1"]), (2, "3,5", ["3", "5"]), (1, "3,5", ["3"]), (0, "", [])],
)
def test_gpus_are_those_that_the_command_may_use(count, chosen, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv(local.VISIBLE, raising=False)
    if chosen is not None:
        monkeypatch.setenv(local.VISIBLE, chosen)
    assert local._gpus() == expected


def note_the_gpu(settings, cell, out, cores):
    """In a cell's process, in the place of `attempt`: waits until as many cells run as there are workers."""
    (out / f"{cell.seed}.started").touch()
    while len(list(out.glob("*.started"))) < cores:
        time.sleep(0.05)
    (out / f"{cell.seed}.gpu").write_text(os.environ[local.VISIBLE])


@pytest.mark.slow
def test_local_workers_share_the_gpus(world, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_gpus", lambda: ["3", "5"])
    monkeypatch.setattr(local, "attempt", note_the_gpu)
    cells = [replace(BASE, seed=seed) for seed in range(4)]
    local.run_locally(experiment(world), cells[:2], tmp_path, Workers(2, 2))
    assert sorted(path.read_text() for path in tmp_path.glob("*.gpu")) == ["3", "5"]
    local.run_locally(experiment(world), cells[2:], tmp_path, Workers(1, 1))  # the second when the first is done
    assert sorted(path.read_text() for path in tmp_path.glob("*.gpu")) == ["3", "3", "3", "5"]


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
    assert mean_seconds(all_results(tmp_path)).keys() == {"base"}


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
