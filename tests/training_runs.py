"""What tests of training ask of whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from conftest import PIXELS
from torch import Tensor

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.config import AdapterConfig, SamplerConfig, TrainingConfig
from gsoft_diffusion.training.run import Run
from gsoft_diffusion.training.train import train


def few_steps(base: Path, photos: Path, folder: Path) -> TrainingConfig:
    """Three steps of a tiny model without its text encoders, a checkpoint after the second, a picture at the end."""
    return TrainingConfig(
        str(photos),
        class_word="dog",
        output_dir=str(folder),
        pretrained_model_name_or_path=str(base),
        adapter=AdapterConfig(nblocks=4, text_encoder=False),
        resolution=PIXELS,
        max_train_steps=3,
        checkpointing_steps=2,
        train_batch_size=2,
        learning_rate=1.0,
        adam_epsilon=0.1,  # large, so that rounding is not blown up where a gradient is next to nothing
        num_validation_images=1,
        validation_prompts=("a dog",),
        report_to="none",
        sampler=SamplerConfig(num_inference_steps=2, guidance_scale=2.0),
    )


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
