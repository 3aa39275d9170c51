"""What tests of training ask of whole runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.training.run import Run
from gsoft_diffusion.training.train import train


def weights(config: TrainingConfig, folder: str | None = None) -> dict[str, Tensor]:
    """The adapter that a run with these settings ends with."""
    changed = replace(config, output_dir=f"{config.output_dir}-{folder}") if folder else config
    return read_adapter(train(changed).adapter).tensors


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def batches(config: TrainingConfig, monkeypatch) -> tuple[Run, list[dict[str, Tensor]]]:
    """The run that was made of the settings, and the batches that it has trained on."""
    runs, seen = [], []
    original = Run.batches

    def watched(self):
        runs.append(self)
        for batch in original(self):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(Run, "batches", watched)
    train(config)
    monkeypatch.setattr(Run, "batches", original)
    return runs[0], seen
