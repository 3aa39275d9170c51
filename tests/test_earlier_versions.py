"""Adapters, checkpoints and settings of earlier versions, committed in tests/fixtures, are still understood."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from gsoft_diffusion import load_adapter, read_adapter, save_adapter
from gsoft_diffusion.config import AdapterConfig, TrainingConfig
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training.checkpoints import checkpoint_to_resume, read_state
from gsoft_diffusion.training.train import train

FIRST = Path(__file__).parent / "fixtures" / "first_format"


def settings() -> TrainingConfig:
    return TrainingConfig.from_dict(read_yaml(FIRST / "settings.yaml"))


def test_settings_are_read():
    config = settings()
    assert (config.adapter, config.max_train_steps, config.learning_rate) == (
        AdapterConfig(nblocks=4, parametrization="cayley"),
        4,
        1e-2,
    )
    assert (config.class_word, config.sampler.scheduler, config.mixed_precision) == ("dog", "DDIMScheduler", "no")


@pytest.mark.parametrize("place", ["adapter.safetensors", "checkpoint-2/adapter.safetensors"])
def test_an_adapter_loads_to_the_bit(base, place):
    model = load_model(str(base))
    adapter, file = load_adapter(FIRST / place, model.unet, [model.text_encoder])
    written, loaded = load_file(FIRST / place), adapter.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
    assert file.config == AdapterConfig(nblocks=4, parametrization="cayley")
    assert file.base_model.name == "base"
    assert (file.prompts["instance_prompt"], file.training["resolution"]) == ("a photo of a sks dog", 32)


def test_an_adapter_is_written_anew_to_the_bit(tmp_path):
    """For programs that read the parametrization in the keys: comfyui/README.md."""
    file, path = read_adapter(FIRST / "adapter.safetensors"), tmp_path / "adapter.safetensors"
    save_adapter(path, file, base_model=file.base_model, training=file.training, prompts=file.prompts)
    written, again = load_file(FIRST / "adapter.safetensors"), load_file(path)
    assert again.keys() - written.keys() == {"parametrization.cayley"}
    assert all(torch.equal(again[name], tensor) for name, tensor in written.items())
    found = read_adapter(path)
    assert (found.config, found.base_model, found.training, found.prompts) == (
        file.config,
        file.base_model,
        file.training,
        file.prompts,
    )


def test_a_checkpoint_is_resumed(base, photos, tmp_path, monkeypatch):
    """Its state is taken over to the bit; the run then ends where the earlier version's did, up to rounding."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "base").symlink_to(base)
    shutil.copytree(FIRST / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    config = replace(settings(), resume_from_checkpoint="latest")
    checkpoint = checkpoint_to_resume(config)
    assert checkpoint == Path("run/checkpoint-2")
    state, written = read_state(checkpoint), load_file(checkpoint / "adapter.safetensors")
    assert state["step"] == 2
    assert state["adapter"].keys() == written.keys()
    assert all(torch.equal(state["adapter"][name], tensor) for name, tensor in written.items())
    ended, expected = read_adapter(train(config).adapter).tensors, load_file(FIRST / "adapter.safetensors")
    for name, tensor in expected.items():
        # As a whole: Adam divides by tiny numbers, so that rounding, which is the processor's own, moves single ones.
        # Without the optimizer's state from the checkpoint it would be tenths.
        assert (ended[name] - tensor).norm() <= 5e-3 * tensor.norm(), name
    AcceleratorState._reset_state(reset_partial_state=True)
