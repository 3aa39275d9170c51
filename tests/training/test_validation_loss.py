"""The loss under the same crops, noise and timesteps every time."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from pretended import pretended_training
from training_runs import assert_same, weights

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.models.noise import prediction_target
from gsoft_diffusion.photos.crops import Variant, pixels
from gsoft_diffusion.photos.folder import read_folder
from gsoft_diffusion.training.dataset import HELD_OUT, generator_for
from gsoft_diffusion.training.predictor import Predictor
from gsoft_diffusion.training.progress import read_progress
from gsoft_diffusion.training.train import train


@pytest.fixture
def measuring(config):
    return replace(config, validation_loss=True, validation_steps=2, checkpointing_steps=2)


def losses(folder: Path) -> dict[int, float]:
    found = {each.step: each.validation_loss for each in read_progress(folder)}
    return {step: loss for step, loss in found.items() if loss is not None}


@pytest.fixture
def held_out(tmp_path) -> Path:
    folder = tmp_path / "others"
    folder.mkdir()
    for number in range(2):
        Image.effect_noise((60, 40), 80 + number).convert("RGB").save(folder / f"{number}.png")
    (folder / "1.txt").write_text("a sks dog asleep")
    return folder


def test_it_is_the_error_of_the_adapters_prediction_under_fixed_noise(measuring):
    """Computed anew from the adapter's file, prompt by prompt and timestep by timestep."""
    folder = train(measuring).adapter.parent
    model = load_model(measuring.pretrained_model_name_or_path)
    load_adapter(folder / "adapter.safetensors", model.denoiser, model.text_encoders)
    scheduler, errors = model.noise_scheduler(), []
    side = model.resolution
    for number, photo in enumerate(read_folder(measuring.instance_data_dir, "", "a photo of a sks dog").photos):
        moments = model.encode_images(pixels(photo, Variant((side, side)))[None])
        latents = moments[:, :4] * model.vae.config.scaling_factor
        noise = torch.randn((8, *latents.shape[1:]), generator=generator_for(measuring.seed, HELD_OUT, number))
        conditioning = model.encode_prompts([photo.prompt])
        for place in range(8):
            timestep = torch.tensor([1000 * (2 * place + 1) // 16])
            with torch.no_grad():
                noisy = scheduler.add_noise(latents, noise[place][None], timestep)
                found = model.predict(noisy, timestep, conditioning, torch.zeros(1, 6))
            target = prediction_target(scheduler, latents, noise[place][None], timestep)
            errors.append((found - target).square().mean().item())
    assert losses(folder)[4] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_it_is_measured_when_validation_is_due_and_at_the_end_and_changes_nothing(measuring):
    plain = weights(replace(measuring, validation_loss=False), "plain")
    folder = train(replace(measuring, max_train_steps=5)).adapter.parent
    assert list(losses(folder)) == [2, 4, 5]
    assert_same(plain, read_adapter(folder / "checkpoint-4").tensors)
    with (folder / "validation" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["step"]): float(row["validation_loss"]) for row in rows} == losses(folder)
    assert (folder / "validation" / "curve.png").is_file()


def test_prompts_numbers_stay_in_main_memory(measuring, monkeypatch):
    """So the encoded prompts are looked up on either device without a wait."""
    asked: list[str] = []
    forward = Predictor.forward

    def watched(predictor, latents, timesteps, prompts, prompt_of, views):
        asked.extend((prompts.device.type, prompt_of.device.type))
        return forward(predictor, latents, timesteps, prompts, prompt_of, views)

    monkeypatch.setattr(Predictor, "forward", watched)
    pretended_training(measuring)
    assert len(asked) > 2 * measuring.max_train_steps  # those of the validation loss as well
    assert set(asked) == {"cpu"}


def test_a_resumed_run_measures_the_same(measuring):
    folder = train(measuring).adapter.parent
    before = losses(folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "adapter.safetensors").unlink()
    (folder / "progress.jsonl").unlink()
    train(replace(measuring, resume_from_checkpoint="latest"))
    assert losses(folder) == {4: before[4]}


def test_trackers_are_told(measuring, monkeypatch):
    from accelerate import Accelerator

    told = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, numbers, step: told.update({step: numbers}))
    folder = train(measuring).adapter.parent
    assert {step: numbers["validation_loss"] for step, numbers in told.items() if "validation_loss" in numbers} == (
        losses(folder)
    )


def test_held_out_photos_are_measured_on_and_not_trained_on(measuring, held_out):
    plain = weights(replace(measuring, validation_loss=False), "plain")
    folder = train(replace(measuring, validation_data_dir=str(held_out))).adapter.parent
    assert_same(plain, read_adapter(folder).tensors)
    on_trained = train(replace(measuring, output_dir=f"{folder}-trained")).adapter.parent
    assert losses(folder)[4] != losses(on_trained)[4]
    content = (folder / "adapter.safetensors").read_bytes()
    assert b"validation_data_dir" not in content


def test_a_held_out_photo_that_is_trained_on_is_refused(measuring, held_out):
    shutil.copy(Path(measuring.instance_data_dir) / "1.png", held_out / "copy.png")
    with pytest.raises(UserError, match=r"copy\.png: is the same picture as .*1\.png, which is trained on"):
        train(replace(measuring, validation_data_dir=str(held_out)))


@pytest.mark.parametrize("changes", [{"aspect_buckets": True}, {"optimizer": "schedulefree"}], ids=str)
def test_other_settings_go_along(measuring, held_out, changes):
    if "optimizer" in changes:
        pytest.importorskip("schedulefree")
    folder = train(replace(measuring, validation_data_dir=str(held_out), **changes)).adapter.parent
    assert all(0 < loss < 10 for loss in losses(folder).values())
