"""Every family's whole life on a GPU, a pretended one: training, validation, resuming, drawing, merging, exporting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pretended import PretendedTraining, pretended_gpu, pretended_training
from tiny_families import WRITERS
from torch import Tensor
from training_runs import assert_same, difference, few_steps

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.config import AdapterConfig, ExportConfig, GenerationConfig, TrainingConfig
from gsoft_diffusion.models.families import FAMILIES
from gsoft_diffusion.models.loading import load_architecture
from gsoft_diffusion.publish.export import export
from gsoft_diffusion.sampling.drawing import draw
from gsoft_diffusion.training.train import train

WITH_TEXT_ENCODERS = {"adapter": AdapterConfig(nblocks=4), "text_encoder_lr": 1.0}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def family_base(family, tmp_path_factory) -> Path:
    """A tiny model of the family. Read only."""
    return WRITERS[family](tmp_path_factory.mktemp("base") / family.__name__)


@pytest.fixture(scope="module")
def with_text_encoders(family_base) -> dict[str, object]:
    """Settings by which text encoders train, where an adapter may be in them."""
    return WITH_TEXT_ENCODERS if load_architecture(str(family_base)).text_encoders else {}


@pytest.fixture
def config(family_base, photos, tmp_path) -> TrainingConfig:
    return few_steps(family_base, photos, tmp_path / "run")


def learned(config: TrainingConfig) -> dict[str, Tensor]:
    """The adapter in a run's folder, which must have learned something in every part of the model that it is in."""
    tensors = read_adapter(config.output_dir or "").tensors
    changed = {name for name, tensor in tensors.items() if (tensor != name.endswith("output_scale")).any()}
    assert {name.partition(".")[0] for name in changed} == {name.partition(".")[0] for name in tensors}
    return tensors


def sheet(config: TrainingConfig) -> np.ndarray:
    """The validation picture of a run."""
    (path,) = (Path(config.output_dir or "") / "validation").iterdir()
    return np.asarray(Image.open(path), dtype=int)


def assert_waits_once(run: PretendedTraining) -> None:
    """For the loss, and the gradients' norm with it, in the second step: the first copies tables to the GPU."""
    assert sum(run.waits[1].values()) == 1, run.waits[1]
    assert str(*run.waits[1]).startswith("_to_copy at gsoft_diffusion/training/step.py:")


@pytest.mark.slow
def test_the_numbers_are_those_of_the_cpu(config, with_text_encoders, tmp_path):
    """In float32, with activations computed again and class images; then drawn, merged and exported on the GPU."""
    config = replace(
        config,
        with_prior_preservation=True,
        num_class_images=2,
        aspect_buckets=True,
        gradient_checkpointing=True,
        **with_text_encoders,
    )
    on_cpu = replace(config, output_dir=str(tmp_path / "cpu"))
    train(on_cpu)
    assert_waits_once(pretended_training(config))
    assert difference(learned(config), learned(on_cpu)) < 1e-4
    assert np.abs(sheet(config) - sheet(on_cpu)).max() <= 2
    with pretended_gpu() as gpu:
        adapter = (config.output_dir or "",)
        draw(GenerationConfig(adapter, prompts=("a dog",), num_images=1, compare=True))
        draw(
            GenerationConfig(
                adapter, prompts=("a dog",), num_images=2, cpu_offload=True, offload_layers=True, mixed_precision="fp16"
            )
        )
        assert gpu.kernels.total() > 1000
        merged = export(ExportConfig(adapter, "diffusers"))
        lora = export(ExportConfig(adapter, "diffusers_lora", rank=4))
    assert (merged / "model_index.json").is_file()
    assert lora.is_file()


@pytest.mark.slow
def test_half_precision_with_all_but_the_adapted_layers_in_main_memory(config):
    """And what is there in eight bits."""
    config = replace(config, mixed_precision="bf16", cpu_offload=True, offload_layers=True, quantize_base="float8")
    assert_waits_once(pretended_training(config))
    learned(config)


@pytest.mark.slow
def test_scaled_losses_with_latents_made_in_each_batch(config, with_text_encoders):
    """In float16, with photos from a worker process and gradients accumulated; resumed, it goes on exactly."""
    config = replace(
        config,
        mixed_precision="fp16",
        cache_latents=False,
        dataloader_num_workers=1,
        gradient_accumulation_steps=2,
        **with_text_encoders,
    )
    assert_waits_once(pretended_training(config))
    whole = learned(config)
    (Path(config.output_dir or "") / "adapter.safetensors").unlink()
    pretended_training(replace(config, resume_from_checkpoint="latest"))
    assert_same(whole, learned(config))
