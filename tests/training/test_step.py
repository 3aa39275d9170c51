"""What a step learns from, and what stops it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from training_runs import assert_same, batches, difference, weights

from gsoft_diffusion.config import AdapterConfig, Concept, TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training import step as step_module
from gsoft_diffusion.training import train as training
from gsoft_diffusion.training.checkpoints import read_state
from gsoft_diffusion.training.dataset import collate
from gsoft_diffusion.training.run import Run
from gsoft_diffusion.training.train import train


@pytest.mark.parametrize(("text_encoder", "prior"), [(True, True), (False, False)])
def test_loss_falls(any_base, config, text_encoder, prior):
    """On a fixed set of samples, for both ways of predicting, with and without prior and text encoder."""
    config = replace(
        config,
        pretrained_model_name_or_path=str(any_base),
        adapter=AdapterConfig(nblocks=4, text_encoder=text_encoder),
        with_prior_preservation=prior,
        num_class_images=2 if prior else TrainingConfig.num_class_images,
        max_train_steps=20,
        cache_latents=False,  # the samples that are measured are not the run's
    )
    losses = []

    class Measured(Run):
        def measure(self) -> None:
            with torch.no_grad():
                batch = collate([self.dataset[position] for position in range(1000, 1032)])
                losses.append(self.training_step.loss(batch).item())

        def execute(self):
            self.measure()
            result = super().execute()
            self.measure()
            return result

    original, training.Run = training.Run, Measured
    try:
        train(config)
    finally:
        training.Run = original
    assert losses[1] < 0.98 * losses[0]


def test_every_batch_has_dropout_of_its_own(config, monkeypatch):
    keys, derived_seed = [], step_module.derived_seed
    monkeypatch.setattr(step_module, "derived_seed", lambda *key: keys.append(key) or derived_seed(*key))
    train(replace(config, gradient_accumulation_steps=3, max_train_steps=2))
    assert [key[2] for key in keys] == list(range(6))


@pytest.fixture
def predicting(config):
    """The class is kept by the base model's predictions, under settings in which every part of a sample counts."""
    changes = {"random_flip": True, "offset_noise": 0.1, "learning_rate": 1e-1}
    return replace(config, with_prior_preservation=True, prior_target="base_prediction", **changes)


def test_the_class_is_held_to_what_the_base_model_predicts(predicting, monkeypatch):
    """For the photos and the class prompt, as the model says that no adapter was ever in."""
    original, seen = step_module.training_loss, []

    def loss(model_pred, target, timesteps, is_prior, scheduler, **options):
        seen.append((model_pred.detach()[is_prior], target[is_prior]))
        return original(model_pred, target, timesteps, is_prior, scheduler, **options)

    monkeypatch.setattr(step_module, "training_loss", loss)
    run, given = batches(predicting, monkeypatch)
    assert run.dataset.prompts == ["a photo of a sks dog", "a photo of a dog"]
    assert not (Path(predicting.output_dir).parent / "class_images").exists()
    model = load_model(predicting.pretrained_model_name_or_path)
    scheduler, conditioning = model.noise_scheduler(), model.encode_prompts(["a photo of a dog"] * 2)
    for (found, target), batch in zip(seen, given, strict=True):
        own = {name: tensor[batch["is_prior"]] for name, tensor in batch.items() if len(tensor) == 4}
        noise = own["noise"] + 0.1 * own["offset"]
        noisy = scheduler.add_noise(model.sample_latents(own["moments"], own["latent_noise"]), noise, own["timestep"])
        with torch.no_grad():
            expected = model.predict(noisy, own["timestep"], conditioning, own["view"])
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)
        if given[0] is batch:  # nothing is learned yet, so that there is nothing to put right
            torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-4)
        else:
            assert (found - target).abs().max() > 1e-3


def test_the_class_of_each_subject_is_held(predicting, tmp_path, monkeypatch):
    mugs = tmp_path / "mugs"
    mugs.mkdir()
    for number in range(2):
        Image.effect_noise((40, 40), 50 + number).save(mugs / f"{number}.png")
    concepts = (Concept(predicting.instance_data_dir, "dog", "sks"), Concept(str(mugs), "mug", "zwx"))
    config = replace(predicting, instance_data_dir="", class_word=None, concepts_list=concepts, max_train_steps=6)
    run, _ = batches(config, monkeypatch)
    prompts = {(photo.path.parent.name, photo.prompt) for photo in run.dataset.streams[1]}
    assert prompts == {("photos", "a photo of a dog"), ("mugs", "a photo of a mug")}


def test_a_mask_takes_nothing_from_the_class(predicting, monkeypatch):
    mask = Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 20, 40))
    mask.save(Path(predicting.instance_data_dir) / "0-masklabel.png")
    _, given = batches(replace(predicting, unmasked_weight=0.0, max_train_steps=8), monkeypatch)
    weights_of_class = torch.cat([batch["weights"][batch["is_prior"]] for batch in given])
    assert (weights_of_class == 1).all()
    assert any((batch["weights"] < 1).any() for batch in given)


def test_masks_keep_the_background_out_of_the_gradient(config, monkeypatch):
    """With weight 0 outside of the mask it does not matter what is there to predict."""
    for name, size in (("0", (40, 40)), ("1", (64, 40)), ("2", (40, 64)), ("3", (33, 32))):
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.save(Path(config.instance_data_dir) / f"{name}-masklabel.png")
    config = replace(config, unmasked_weight=0.0, center_crop=True)
    clean = weights(config, "clean")
    original = step_module.prediction_target

    def disturbed(*arguments):
        target = original(*arguments).clone()
        target[..., target.shape[-1] * 3 // 4 :] += 100
        return target

    monkeypatch.setattr(step_module, "prediction_target", disturbed)
    assert_same(clean, weights(config, "disturbed"))
    assert difference(clean, weights(replace(config, unmasked_weight=0.5), "weighted")) > 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step_named(config, monkeypatch, bad):
    original = step_module.training_loss
    calls = []

    def loss(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options) * (bad if len(calls) == 3 else 1.0)

    monkeypatch.setattr(step_module, "training_loss", loss)
    with pytest.raises(UserError, match="step 3: the loss is not finite; checkpoint-2 is kept"):
        train(replace(config, checkpointing_steps=2))
    state = read_state(Path(config.output_dir or "") / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in state["adapter"].values())


def test_a_gradient_that_is_not_finite_stops_with_the_step_named(config, monkeypatch):
    original = step_module.training_loss
    monkeypatch.setattr(
        step_module, "training_loss", lambda *a, **k: (original(*a, **k) * 1e38) * 1e-38 * torch.ones(())
    )
    original_clip = Accelerator.clip_grad_norm_

    def clip(self, parameters, max_norm):
        parameters = list(parameters)
        parameters[0].grad[:] = float("nan")
        return original_clip(self, parameters, max_norm)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    with pytest.raises(UserError, match="step 1: the gradient is not finite; no checkpoint is kept"):
        train(config)


@pytest.fixture
def fp16_scaler(monkeypatch):
    """PyTorch's scaler of gradients, which accelerate uses on GPUs only, on the CPU: returns it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # beyond what a float32 gradient of ours overflows at
    original = training.make_accelerator

    def make_accelerator(config):
        accelerator = original(config)
        accelerator.scaler, accelerator.native_amp = scaler, True
        return accelerator

    monkeypatch.setattr(training, "make_accelerator", make_accelerator)
    return scaler


def test_skipped_steps_are_counted_shown_and_resumed(config, fp16_scaler, monkeypatch, capfd):
    config = replace(config, mixed_precision="fp16", checkpointing_steps=2)
    original = step_module.training_loss
    monkeypatch.setattr(step_module, "training_loss", lambda *a, **k: original(*a, **k) * 1e30)  # overflows when scaled
    train(config)
    assert fp16_scaler.get_scale() == 2.0**36  # halved four times
    printed = capfd.readouterr()
    assert "4 of 4 steps were skipped" in printed.out
    assert "skipped=4" in printed.err
    state = read_state(Path(config.output_dir or "") / "checkpoint-4")
    assert (state["skipped"], state["scaler"]["scale"]) == (4, 2.0**36)
    assert state["lr_scheduler"]["last_epoch"] == 0
    fp16_scaler.update(1.0)
    monkeypatch.setattr(fp16_scaler, "load_state_dict", lambda state: None)  # from a scale at which there is no way out
    with pytest.raises(UserError, match="step 5: the gradient is not finite; checkpoint-4 is kept"):
        train(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))


def learned(config: TrainingConfig, capfd) -> list[str]:
    """What a run says of parts that have learned nothing."""
    train(config)
    return [line for line in capfd.readouterr().out.splitlines() if "nothing was learned" in line]


def test_a_run_that_learns_nothing_says_so(config, capfd):
    assert learned(replace(config, output_dir=f"{config.output_dir}-whole"), capfd) == []
    (text,) = learned(replace(config, text_encoder_lr=1e-12, output_dir=f"{config.output_dir}-text"), capfd)
    assert "in the text encoder: its rotations are identities; raise --text_encoder_lr" in text
    alone = replace(config, learning_rate=1e-12, adapter=AdapterConfig(nblocks=4, text_encoder=False))
    (denoiser,) = learned(alone, capfd)
    assert "in the unet: its rotations are identities; raise --learning_rate" in denoiser


def test_a_run_whose_steps_were_all_skipped_says_that_nothing_was_learned(config, fp16_scaler, monkeypatch, capfd):
    original = step_module.training_loss
    monkeypatch.setattr(step_module, "training_loss", lambda *a, **k: original(*a, **k) * 1e30)
    lines = learned(replace(config, mixed_precision="fp16"), capfd)
    assert len(lines) == 2
    assert all("all steps were skipped; use --mixed_precision bf16" in line for line in lines)
