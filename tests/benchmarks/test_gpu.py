"""The command for a machine with a GPU: its order, its time, its messages and its tables."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import METHODS, Budget, Part, parts, report, run, run_tests, why_no_gpu
from benchmarks.pretended_gpu import PretendedGPU

STEPS = [
    {"method": "lora", "repetition": 0, "seconds": [0.2, 0.1], "peak_bytes": 3 * 2**20},
    {"method": "double_gsoft", "repetition": 0, "seconds": [0.12], "peak_bytes": 2 * 2**20},
    {"method": "boft", "repetition": 0, "error": "out of memory"},
]
CALLS = [{"repetition": 0, "seconds": {"base": 0.05, "lora": 0.06, "unmerged": 0.05, "merged": 0.05}}]


def test_the_most_telling_parts_come_first():
    found = parts(["sd15", "sdxl"], [1, 4])
    assert len(found) == len({part.name for part in found}) == 2 * 2 * 2 * 2
    assert not any(part.compiled for part in found[:8])
    assert [part.title for part in found[:5]] == [
        "training steps, Stable Diffusion 1.5, 512 px, batch 1",
        "training steps, SDXL, 1024 px, batch 1",
        "sampling, Stable Diffusion 1.5, 512 px, batch 1",
        "sampling, SDXL, 1024 px, batch 1",
        "training steps, Stable Diffusion 1.5, 512 px, batch 4",
    ]


@pytest.mark.parametrize("module", ["step", "sampling"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_is_a_command_that_its_module_takes(module, compiled, monkeypatch, tmp_path):
    """Up to where the model would be loaded."""
    out = tmp_path / "part.json"
    command = Part(module, "mini", 4, compiled).command(torch.device("cpu"), out, steps=3)
    monkeypatch.setattr(sys, "argv", command[2:])
    made = []

    def stop(args):
        made.append(args)
        raise InterruptedError

    monkeypatch.setattr(f"benchmarks.{module}.Bench", stop)
    with pytest.raises(InterruptedError):
        import_module(f"benchmarks.{module}").main()
    (args,) = made
    assert (args.base, args.batch, args.compile, args.out) == ("mini", 4, compiled, out)


def test_a_process_is_ended_when_the_time_is_over():
    started = time.monotonic()
    assert run([sys.executable, "-c", "import time; time.sleep(60)"], 1.0) == "the time was over"
    assert time.monotonic() - started < 30
    assert run([sys.executable, "-c", "raise SystemExit(3)"], 60) == "ended with exit status 3; see its message"
    assert run([sys.executable, "-c", ""], 60) == ""


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.main() == 2
    assert "error: PyTorch" in (said := capsys.readouterr().err)
    assert "is built without CUDA; install a build with it" in said
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "error: PyTorch finds no GPU; check that `nvidia-smi` lists one" in capsys.readouterr().err
    with PretendedGPU():
        assert why_no_gpu() is None


def test_a_device_that_there_is_not_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "gpu0"])
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: None)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "error: --device gpu0: cannot be used" in capsys.readouterr().err


@pytest.mark.slow
def test_the_device_tests_are_skipped_by_name_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = run_tests(tmp_path / "tests.xml", 300)
    assert (found["passed"], found["failed"], found["ended"]) == (0, [], "")
    assert any("test_a_step_waits_for_the_gpu_once" in name for name, _ in found["skipped"])
    assert {why for _, why in found["skipped"]} == {"needs an NVIDIA GPU, and PyTorch built with CUDA"}


def test_what_the_time_does_not_allow_is_named(monkeypatch, tmp_path, capsys):
    """The first part writes some records, the second fails, the third finds no time."""
    monkeypatch.setattr(gpu, "run_tests", lambda *_: {"passed": 3, "failed": ["a::b"], "skipped": [], "ended": ""})
    monkeypatch.setattr(gpu, "machine", lambda _: {"processor": "here", "versions": {"torch": "2"}})
    left, ends = [100.0], iter(["the time was over", "ended with exit status 1; see its message"])
    monkeypatch.setattr(Budget, "left", property(lambda budget: left[0]))

    def measured(command, seconds):
        ended, out = next(ends), Path(command[command.index("--out") + 1])
        if "status" in ended:
            left[0] = -1.0
        else:
            out.parent.mkdir(parents=True)
            out.write_text(json.dumps({"records": STEPS}))
        return ended

    monkeypatch.setattr(gpu, "run", measured)
    arguments = ["--device", "cpu", "--bases", "mini", "--batches", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    assert gpu.main() == 0
    said = (tmp_path / "gpu.md").read_text()
    assert said.strip() in capsys.readouterr().out
    assert "Device tests: 3 passed, 1 failed, 0 were skipped." in said
    assert "- failed: a::b" in said
    lines = [line for line in said.splitlines() if line.startswith("- ")]
    some = (
        f"- training steps, the miniature base, batch 1: {METHODS['floor'][1]}, OFT v2 (PEFT), since the time was over"
    )
    assert some in lines
    assert "- sampling, the miniature base, batch 1: all, since ended with exit status 1; see its message" in lines
    assert "- training steps, the miniature base, batch 1, compiled: all, since no time was left" in lines
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [len(part["records"]) for part in content["parts"]] == [3, 0, 0, 0]


def test_the_table_has_ratios_and_what_ran_out_of_memory():
    machine = {"gpu": {"name": "card", "memory_gib": 24, "driver": "1", "cuda": "13"}, "versions": {}}
    shared = {"base": "sd15", "batch": 1, "missing": [], "why": ""}
    found = [
        {"module": "step", "compiled": False, "records": STEPS, **shared},
        {"module": "sampling", "compiled": True, "records": CALLS, **shared},
    ]
    tests = {"passed": 1, "failed": [], "skipped": [["a", "no GPU"], ["b", "no GPU"]], "ended": ""}
    said = report({"machine": machine, "tests": tests, "parts": found})
    assert said.startswith("card, 24 GiB, driver 1, CUDA 13;")
    assert "- skipped: 2, no GPU" in said
    assert "**Stable Diffusion 1.5, 512 px, batch 1**" in said
    assert "| Double GSOFT | 120.0 | 1.20 | 2 |  |  |  |  |  | 50.0 | 1.00 |" in said
    assert "| LoRA (PEFT) | 100.0 | 1.00 | 3 |  |  |  |  |  | 60.0 | 1.20 |" in said
    assert "| BOFT | out of memory |  |  |  |  |  |  |  |  |  |" in said
    assert "Not measured" not in said
