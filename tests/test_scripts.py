"""The two commands as a person types them: other processes, another working directory, exit statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.training.checkpoints import checkpoints

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / script), *map(str, arguments)]


def run(folder: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(script, *arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def quick(base: Path, photos: Path, *more: object) -> tuple[object, ...]:
    quickly = ("--nblocks", 4, "--max_train_steps", 4, "--num_inference_steps", 2, "--validation_steps", 2)
    which = ("--instance_data_dir", photos, "--class_word", "dog", "--pretrained_model_name_or_path", base)
    return (*which, *quickly, "--learning_rate", 1e-2, *more)


def test_train_then_draw(base, photos, tmp_path):
    done = run(tmp_path, "train_dreambooth_gsoft.py", *quick(base, photos))
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "outputs" / "photos" / "adapter.safetensors"
    assert str(adapter.relative_to(tmp_path)) in done.stdout
    drawn = run(adapter.parent, "inference.py", "--adapter", adapter.name, "--prompt", "a sks dog", "--compare")
    assert drawn.returncode == 0, drawn.stderr
    assert len(list((adapter.parent / "images").glob("*_seed*.png"))) == 8
    assert "contact_sheet_0000.png" in drawn.stdout


@pytest.mark.parametrize("script", ["train_dreambooth_gsoft.py", "inference.py", "export.py"])
def test_mistakes_are_one_line_and_status_2(script, tmp_path):
    arguments = {
        "train_dreambooth_gsoft.py": ("--instance_data_dir", "nowhere", "--class_word", "dog"),
        "inference.py": ("--adapter", "nowhere", "--prompt", "a"),
        "export.py": ("--adapter", "nowhere", "--format", "checkpoint"),
    }[script]
    done = run(tmp_path, script, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_saves_and_the_printed_command_goes_on(base, photos, tmp_path):
    arguments = quick(base, photos, "--output_dir", "dog", "--report_to", "none", "--num_validation_images", 0)
    whole = run(tmp_path, "train_dreambooth_gsoft.py", *arguments, "--output_dir", "whole", "--max_train_steps", 60)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        command("train_dreambooth_gsoft.py", *arguments, "--max_train_steps", 60, "--checkpointing_steps", 5),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not checkpoints(tmp_path / "dog"):  # wait until it is in the middle of it
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 130
    stopped_at = read_adapter(tmp_path / "dog" / "adapter.safetensors").training["step"]
    assert 5 <= stopped_at < 60
    (line,) = (line for line in printed.splitlines() if line.startswith("stopped at"))
    resumed = run(tmp_path, "train_dreambooth_gsoft.py", *line.partition("to go on: ")[2].split()[2:])
    assert resumed.returncode == 0, resumed.stderr
    first, second = (read_adapter(tmp_path / name / "adapter.safetensors").tensors for name in ("whole", "dog"))
    assert all((first[name] == second[name]).all() for name in first)
