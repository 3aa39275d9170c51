"""A short run on the tiny base."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from gsoft_diffusion.config import AdapterConfig, SamplerConfig, TrainingConfig


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its settings for the life of the process, and every test here stands for a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(base, photos, tmp_path) -> TrainingConfig:
    """A run of four steps that draws and reports nothing."""
    return TrainingConfig(
        str(photos),
        class_word="dog",
        output_dir=str(tmp_path / "runs" / "dog"),
        pretrained_model_name_or_path=str(base),
        adapter=AdapterConfig(nblocks=4),
        max_train_steps=4,
        train_batch_size=2,
        learning_rate=1e-2,
        num_validation_images=0,
        validation_prompts=("a sks dog on the beach",),
        report_to="none",
        sampler=SamplerConfig(num_inference_steps=2),
    )
