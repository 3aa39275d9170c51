"""A page's folder, and a base and photos small enough for jobs that take seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gsoft_diffusion.app import jobs as jobs_module
from gsoft_diffusion.app.jobs import Jobs
from gsoft_diffusion.app.workspace import Workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "outputs")


@pytest.fixture
def jobs(workspace) -> Iterator[Jobs]:
    """The queue of the folder, closed at the end, and its processes ended."""
    queue = Jobs(workspace)
    yield queue
    queue.close()
    for child in queue._children.values():
        child.kill()
        child.wait()


@pytest.fixture
def sleeping(monkeypatch):
    """Jobs that do nothing until they are told to end, with their signals as a command has them."""
    code = (
        "import os, signal, sys, time; from pathlib import Path; folder = Path(sys.argv[1]);"
        "signal.signal(signal.SIGUSR1, lambda *_: print('asked to draw', flush=True));"
        "end = lambda *_: ((folder / 'end.json').write_text('{\"status\": 130}'), os._exit(130));"
        "signal.signal(signal.SIGTERM, end); print('asleep', flush=True); time.sleep(60)"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        jobs_module.subprocess,
        "Popen",
        lambda command, **options: real([sys.executable, "-c", code, command[-1]], **options),
    )


@pytest.fixture
def run_settings(base, photos, workspace) -> dict[str, Any]:
    """A run of four steps on the tiny base."""
    return {
        "instance_data_dir": str(photos),
        "class_word": "dog",
        "output_dir": str(workspace.root / "dog"),
        "pretrained_model_name_or_path": str(base),
        "adapter": {"nblocks": 4},
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 0.01,
        "num_validation_images": 0,
        "report_to": "none",
        "sampler": {"num_inference_steps": 2},
    }
