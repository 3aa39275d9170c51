from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace

import pytest

from examples.language import compare as module
from examples.language import report
from examples.language.compare import Comparison, compare
from examples.language.training import DivergedError, Run, train
from gsoft_diffusion.foundation.errors import UserError

BAD = 99.0
RATES = {"lora": (1e-2, 2e-2), "gsoft": (2e-2,)}


@pytest.fixture
def comparison(encoder, data_dir, monkeypatch) -> Comparison:
    """One of a few seconds; its trainings run in this process."""
    monkeypatch.setattr(module, "RATES", RATES)
    monkeypatch.setattr(module, "REPETITIONS", 1)
    monkeypatch.setattr(report, "DRAWS", 50)
    monkeypatch.setattr(module, "ProcessPoolExecutor", Here)
    return Comparison(
        str(encoder),
        str(data_dir),
        tasks=("sentiment", "rating"),
        sweep_tasks=("sentiment",),
        methods=tuple(RATES),
        seeds=2,
        max_steps=2,
        evaluations=2,
        batch_size=8,
        max_length=12,
    )


class Here:
    """In place of processes, which take seconds to start."""

    def __init__(self, *settings: object) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function, *arguments):
        future: Future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **how: object) -> None:
        pass


def trainings(folder) -> list[tuple]:
    records = json.loads((folder / "results.json").read_text())["records"]
    names = ("task", "method", "learning_rate", "seed")
    return [tuple(record[name] for name in names) for record in records if record["kind"] == "training"]


def test_a_comparison_from_the_sweep_to_the_report_and_on(comparison, tmp_path, monkeypatch):
    compare(comparison, tmp_path)
    done = trainings(tmp_path)
    assert len(done) == len(set(done)) == 3 + 2 * 2 * 2 - 2
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [record["method"] for record in records if record["kind"] == "step"] == ["lora", "gsoft"]
    assert {record["task"] for record in records if record["kind"] == "truth"} == {"sentiment", "rating"}
    table = (tmp_path / "table.md").read_text()
    assert "| | learned | as the paper counts | sentiment | rating | all | step, s | / LoRA |" in table.replace(
        "|  |", "| |"
    )
    assert (tmp_path / "scores.svg").stat().st_size > 1000

    monkeypatch.setattr(module, "_scores", None)  # nothing is trained again
    compare(comparison, tmp_path)
    monkeypatch.undo()
    assert trainings(tmp_path) == done


def test_what_is_missing_is_trained(comparison, tmp_path):
    compare(replace(comparison, seeds=1), tmp_path)
    before = trainings(tmp_path)
    compare(comparison, tmp_path)
    assert set(before) < set(trainings(tmp_path))
    assert {seed for *_, seed in trainings(tmp_path)} == {0, 1}


def test_results_of_other_settings_are_kept(comparison, tmp_path):
    compare(replace(comparison, seeds=1), tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(UserError, match="other settings"):
        compare(replace(comparison, max_steps=3), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_one_at_a_time_in_a_folder(comparison, tmp_path):
    code = "import sys; from pathlib import Path; from gsoft_diffusion.foundation.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(UserError, match=rf"--out .*: process {other.pid} on .* is at work there"):
            compare(comparison, tmp_path)
        other.communicate()


def test_a_rate_that_diverges_is_not_chosen(comparison, tmp_path, monkeypatch):
    def diverging(one: Run, *given, **options):
        if one.learning_rate == BAD:
            raise DivergedError("the training diverged")
        return train(one, *given, **options)

    monkeypatch.setattr(module, "train", diverging)
    monkeypatch.setattr(module, "RATES", {"lora": (1e-2, BAD), "oft": (BAD,)})
    comparison = replace(comparison, tasks=("rating",), sweep_tasks=("rating",), methods=("lora",), seeds=1)
    compare(comparison, tmp_path / "one")
    assert "| LoRA, r 4 | 99 | diverged |" in (tmp_path / "one" / "table.md").read_text()
    with pytest.raises(UserError, match="every learning rate diverged for oft"):
        compare(replace(comparison, methods=("oft",)), tmp_path / "other")


def test_a_seed_that_diverges_is_said(comparison, tmp_path, monkeypatch):
    def diverging(one: Run, *given, **options):
        if one.seed:
            raise DivergedError("the training diverged")
        return train(one, *given, **options)

    monkeypatch.setattr(module, "train", diverging)
    with pytest.raises(UserError, match="gsoft diverged on sentiment with seed 1"):
        compare(replace(comparison, tasks=("sentiment",), methods=("gsoft",)), tmp_path)


@pytest.mark.slow
def test_processes_of_their_own(encoder, data_dir, tmp_path, monkeypatch, capsys):
    """The command as it is called, with real processes."""
    monkeypatch.setattr(module, "RATES", {"lora": (1e-2,)})
    monkeypatch.setattr(module, "REPETITIONS", 1)
    monkeypatch.setattr(report, "DRAWS", 50)
    size = "--tasks sentiment --sweep_tasks sentiment --methods lora --seeds 2 --max_length 12 --workers 2"
    size += " --max_steps 2 --evaluations 2"
    options = ["--model", str(encoder), "--data_dir", str(data_dir), "--out", str(tmp_path), *size.split()]
    monkeypatch.setattr(sys, "argv", ["compare", *options])
    assert module.main() == 0
    assert len(trainings(tmp_path)) == 2
    assert "scores.svg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("prompt",)}, "--methods prompt: choose from"),
        ({"tasks": ("poetry",)}, "--tasks poetry: choose from"),
        ({"sweep_tasks": ("topic",)}, "--sweep_tasks topic: must be one or more of --tasks"),
        ({"seeds": 0}, "--seeds 0: must be more than 0"),
    ],
)
def test_settings_that_cannot_be(comparison, settings, message):
    with pytest.raises(UserError, match=message):
        replace(comparison, **settings)
