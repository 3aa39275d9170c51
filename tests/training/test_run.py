"""Whole runs: their result, the same result by other ways, and what is printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pretended import pretended_training
from training_runs import assert_same, batches, difference, weights

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training import run as run_module
from gsoft_diffusion.training import validation
from gsoft_diffusion.training.train import train


def test_a_run_leaves_an_adapter_that_loads_and_its_settings(config):
    result = train(config)
    folder = Path(config.output_dir or "")
    assert (result.adapter, result.steps, result.interrupted) == (folder / "adapter.safetensors", 4, False)
    model = load_model(config.pretrained_model_name_or_path)
    adapter, file = load_adapter(result.adapter, model.unet, [model.text_encoder])
    assert all(parameter.abs().max() > 0 for parameter in adapter.parameters())
    assert adapter.orthogonality_error() < 1e-5
    assert file.prompts["instance_prompt"] == "a photo of a sks dog"
    assert file.training["sampler"]["scheduler"] == "DDIMScheduler"
    assert file.training["resolution"] == 32
    settings = TrainingConfig.from_dict(read_yaml(folder / "settings.yaml"))
    adapter_config = replace(config.adapter, fused_attention=False)  # of which the model has none
    known = {"resolution": 32, "text_encoder_lr": 4e-6, "sampler": settings.sampler, "adapter": adapter_config}
    assert settings == replace(config, **known).resolved()


def test_trainables_of_all_parts_move(config):
    tensors = weights(config)
    for name, tensor in tensors.items():
        start = torch.ones(()) if name.endswith("output_scale") else torch.zeros(())
        assert (tensor - start).abs().max() > 0, name
    assert {name.partition(".")[0] for name in tensors} == {"unet", "text_encoder"}


def test_a_run_encodes_what_it_shows(config, monkeypatch):
    """Crops, flips and sizes of a few photos are many; a short run encodes few."""
    config = replace(config, aspect_buckets=True, random_flip=True, max_train_steps=2, checkpointing_steps=1)
    run, seen = batches(replace(config, train_batch_size=2), monkeypatch)
    assert all("moments" in batch for batch in seen)
    assert "pixels" in run.dataset[10_000]  # of another batch, whose photo has another crop


def test_the_vae_is_fetched_once_for_all_photos(config, monkeypatch):
    """Once to measure on them, and once to encode what is trained on."""
    moves = []
    to = AutoencoderKL.to

    def watched(vae: AutoencoderKL, device: torch.device) -> AutoencoderKL:
        if vae.device != device:
            moves.append(device.type)
        return to(vae, device)

    monkeypatch.setattr(AutoencoderKL, "to", watched)
    pretended_training(replace(config, cpu_offload=True, validation_loss=True))
    assert moves == ["cuda"] * 2


def test_same_seed_same_weights_other_seed_other_weights(config):
    first = weights(config, "first")
    assert_same(first, weights(config, "second"))
    assert difference(first, weights(replace(config, seed=1), "third")) > 1e-4


def test_repeating_a_run_from_its_output_folder_gives_the_same_weights_and_pixels(config):
    from gsoft_diffusion.config import GenerationConfig
    from gsoft_diffusion.sampling.drawing import draw

    config = replace(config, num_validation_images=1, with_prior_preservation=True, num_class_images=2)
    first = train(config).adapter.parent
    settings = TrainingConfig.from_dict(read_yaml(first / "settings.yaml"))
    second = train(replace(settings, output_dir=f"{config.output_dir}-again")).adapter.parent
    assert_same(*(read_adapter(folder / "adapter.safetensors").tensors for folder in (first, second)))
    for folder in (first, second):
        draw(GenerationConfig((str(folder / "adapter.safetensors"),), prompts=("a sks dog",), num_images=1))
    for name in ("validation/step-000004.png", "images/0000_seed0_a-sks-dog.png"):
        pictures = [np.asarray(Image.open(folder / name)) for folder in (first, second)]
        assert (pictures[0] == pictures[1]).all(), name


def test_latents_cached_or_not(config):
    """Encoding photos one by one or in batches rounds differently, which Adam would blow up where gradients vanish."""
    config = replace(config, random_flip=True, adam_epsilon=1e-4)
    assert difference(weights(config, "cached"), weights(replace(config, cache_latents=False), "not")) < 1e-5


def test_workers_change_nothing(config):
    config = replace(config, cache_latents=False)
    assert_same(weights(config, "none"), weights(replace(config, dataloader_num_workers=1), "one"))


@pytest.mark.parametrize(
    "prior",
    [
        {},
        {"with_prior_preservation": True, "num_class_images": 2},
        {"with_prior_preservation": True, "prior_target": "base_prediction"},
    ],
    ids=str,
)
def test_accumulated_batches_equal_a_large_one(config, prior):
    config = replace(config, train_batch_size=4, **prior)
    accumulated = replace(config, train_batch_size=1, gradient_accumulation_steps=4)
    assert (
        difference(weights(config, "large"), weights(accumulated, "accumulated")) < 1e-3
    )  # Adam divides by tiny numbers


def test_gradient_checkpointing_changes_nothing(config):
    checkpointed = weights(replace(config, gradient_checkpointing=True), "checkpointed")
    assert difference(weights(config, "plain"), checkpointed) < 1e-4


@pytest.mark.parametrize("text_encoder", [False, True])
def test_compiling_changes_nothing_but_rounding(config, monkeypatch, text_encoder):
    config = replace(config, adapter=replace(config.adapter, text_encoder=text_encoder))
    plain = weights(config, "plain")
    original = torch.compile  # without the part that makes machine code, which takes minutes
    monkeypatch.setattr(torch, "compile", lambda *arguments, **_: original(*arguments, backend="aot_eager"))
    assert difference(plain, weights(replace(config, compile=True), "compiled")) < 1e-3


def test_what_is_printed(config, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), "red").save(Path(config.instance_data_dir) / "turned.jpg", exif=exif)
    result = train(config)
    printed = capfd.readouterr()
    counts = result.adapter
    said = "subject: 5 pictures, 1 of one single colour, 1 turned upright by EXIF data; left out: notes.txt"
    assert said in printed.out
    total = sum(tensor.numel() for tensor in read_adapter(result.adapter).tensors.values())
    assert f"training {total:,} parameters" in printed.out
    assert str(counts) in printed.out
    assert "loss=" in printed.err
    assert "lr=0.01" in printed.err


def test_a_sheet_that_fails_loses_no_step(config, monkeypatch, capfd):
    """As where a picture takes more of a GPU's memory than a step."""
    config = replace(config, validation_steps=2, checkpointing_steps=0, num_validation_images=1)
    generate = validation.generate

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(validation, "generate", fail)
    with pytest.raises(UserError, match=r"out of memory.*--num_validation_images 0 draws none"):
        train(config)
    assert "stopped at step 2; to go on:" in capfd.readouterr().out
    monkeypatch.setattr(validation, "generate", generate)
    train(replace(config, resume_from_checkpoint="latest"))
    resumed = read_adapter(Path(config.output_dir or "") / "adapter.safetensors").tensors
    assert_same(resumed, weights(config, "whole"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_validation": True, "num_validation_images": 1}, "--score_validation: needs at least two photos"),
        ({"validation_loss": True, "validation_data_dir": "photos"}, "which is trained on; name other photos"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_class_images_are_drawn(config, monkeypatch, changes, message):
    monkeypatch.setattr(run_module, "class_photos", lambda *_: pytest.fail("drawn in vain"))
    photos = Path(config.instance_data_dir)
    for name in ("1.png", "2.png", "3.png"):
        (photos / name).unlink()
    monkeypatch.chdir(photos.parent)
    with pytest.raises(UserError, match=message):
        train(replace(config, with_prior_preservation=True, **changes))
