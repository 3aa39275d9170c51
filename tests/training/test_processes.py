"""Runs of several processes: the same numbers as one, and no trouble of one that the others hang on."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from child_runs import train_in_child, train_in_ranks

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.config import AdapterConfig, SamplerConfig, TrainingConfig
from gsoft_diffusion.training.checkpoints import checkpoints, damage_of
from gsoft_diffusion.training.dataset import DreamBoothDataset
from gsoft_diffusion.training.step import TrainingStep

pytestmark = pytest.mark.slow


@pytest.fixture
def config(base, photos, tmp_path) -> TrainingConfig:
    """A run of six steps on batches of four with checkpoints in between."""
    return TrainingConfig(
        str(photos),
        class_word="dog",
        output_dir=str(tmp_path / "run"),
        pretrained_model_name_or_path=str(base),
        adapter=AdapterConfig(nblocks=4),
        max_train_steps=6,
        train_batch_size=4,
        learning_rate=1e-2,
        checkpointing_steps=2,
        num_validation_images=0,
        report_to="none",
        sampler=SamplerConfig(num_inference_steps=2),
    )


@dataclass(frozen=True)
class Observe:
    """Writes down which samples a process trains on, the gradient of its first step, and where it writes."""

    file: Path
    output: str

    def __call__(self) -> None:
        seen: dict[str, Any] = {"positions": [], "gradients": {}, "written": []}
        sample, clip = DreamBoothDataset.__getitem__, TrainingStep.clip

        def getitem(dataset: DreamBoothDataset, position: int) -> Any:
            seen["positions"].append(position)
            return sample(dataset, position)

        def observed(step: TrainingStep) -> torch.Tensor:
            if step.state.step == 0:
                seen["gradients"] = {name: p.grad.clone() for name, p in step.state.adapter.named_parameters()}
            torch.save(seen, self.file)
            return clip(step)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event in ("os.mkdir", "os.rename", "os.remove") or (
                event == "open" and arguments[1] not in ("r", "rb")
            )
            if writes and str(arguments[0]).startswith(self.output):
                seen["written"].append(str(arguments[0]))

        DreamBoothDataset.__getitem__, TrainingStep.clip = getitem, observed  # type: ignore[method-assign]
        sys.addaudithook(audit)


def test_two_processes_equal_one(config, tmp_path):
    """With prior preservation, so that the class images are drawn by one of them and read by both."""
    config = replace(config, with_prior_preservation=True, num_class_images=3, class_data_dir=str(tmp_path / "class"))
    config = replace(config, adam_epsilon=1e-4)  # where gradients vanish, Adam would blow up the last bits
    alone = replace(config, output_dir=str(tmp_path / "alone"))
    together = replace(config, output_dir=str(tmp_path / "together"), train_batch_size=2)
    outcome = train_in_child(alone, tmp_path / "log", Observe(tmp_path / "seen", alone.output_dir))
    assert outcome.status == 0, outcome.output
    observers = [Observe(tmp_path / f"seen-{rank}", together.output_dir) for rank in range(2)]
    for outcome in train_in_ranks(together, tmp_path / "logs", observers):
        assert outcome.status == 0, outcome.output
    one, *two = (torch.load(path) for path in (tmp_path / "seen", *(observer.file for observer in observers)))
    assert one["positions"] == list(range(6 * 8))
    assert sorted(two[0]["positions"] + two[1]["positions"]) == one["positions"]
    for name, gradient in one["gradients"].items():
        for rank in range(2):
            torch.testing.assert_close(two[rank]["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
    assert len(two[0]["written"]) > 0
    assert two[1]["written"] == []
    first, second = (read_adapter(Path(run.output_dir) / "adapter.safetensors").tensors for run in (alone, together))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-6)


@dataclass(frozen=True)
class AtStep:
    """Does something in the forward pass of the step after the given one."""

    step: int
    what: str

    def __call__(self) -> None:
        original = TrainingStep.loss

        def loss(step: TrainingStep, batch: Any) -> Any:
            value = original(step, batch)
            if step.state.step == self.step:
                if self.what == "nan":
                    return value * float("nan")
                os.kill(os.getpid(), getattr(signal, self.what))
            return value

        TrainingStep.loss = loss  # type: ignore[method-assign]


def full_disk() -> None:
    """No file of this process may get longer than a small adapter file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("rank", "number"), [(1, "SIGTERM"), (0, "SIGINT")])
def test_a_signal_to_one_of_them_stops_all_with_everything_saved(config, tmp_path, rank, number):
    config = replace(config, train_batch_size=2)
    faults = [AtStep(2, number) if rank == unlucky else None for unlucky in range(2)]
    for outcome in train_in_ranks(config, tmp_path / "logs", faults):
        assert outcome.status == 130, outcome.output
    assert read_adapter(tmp_path / "run" / "adapter.safetensors").training["step"] == 3
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-3"


def test_resuming_two_processes_is_exact(config, tmp_path):
    config = replace(config, train_batch_size=2)
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    again = replace(config, resume_from_checkpoint="latest")
    for settings, fault, status in ((whole, None, 0), (config, AtStep(3, "SIGTERM"), 130), (again, None, 0)):
        for outcome in train_in_ranks(settings, tmp_path / "logs", [None, fault]):
            assert outcome.status == status, outcome.output
    first, second = (read_adapter(tmp_path / name / "adapter.safetensors").tensors for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("rank", "fault", "statuses", "messages"),
    [
        (1, AtStep(2, "nan"), (2, 2), ("step 3: the loss is not finite; checkpoint-2 is kept",) * 2),
        (1, AtStep(2, "SIGKILL"), (2, -9), ("another of this run's 2 processes has ended", "")),
        (0, AtStep(2, "SIGKILL"), (-9, 2), ("", "another of this run's 2 processes has ended")),
        (0, full_disk, (2, 2), ("checkpoint-2: File too large", "another of this run's 2 processes has ended")),
    ],
    ids=["bad loss", "second dies", "first dies", "full disk"],
)
def test_trouble_of_one_ends_all_with_a_message_and_the_checkpoint(config, tmp_path, rank, fault, statuses, messages):
    config = replace(config, train_batch_size=2)
    faults = [fault if rank == unlucky else None for unlucky in range(2)]
    outcomes = train_in_ranks(config, tmp_path / "logs", faults)
    assert tuple(outcome.status for outcome in outcomes) == statuses
    for outcome, message in zip(outcomes, messages, strict=True):
        assert message in outcome.output
        assert "Traceback" not in outcome.output
    kept = [] if fault is full_disk else ["checkpoint-2"]
    assert [path.name for path in checkpoints(tmp_path / "run")] == kept
    assert all(damage_of(path) is None for path in checkpoints(tmp_path / "run"))


def test_another_number_of_processes_is_named(config, tmp_path):
    assert train_in_child(replace(config, max_train_steps=2), tmp_path / "log").status == 0
    for outcome in train_in_ranks(replace(config, resume_from_checkpoint="latest"), tmp_path / "logs", [None, None]):
        assert outcome.status == 2
        assert "number of processes is 2 and was 1" in outcome.output
