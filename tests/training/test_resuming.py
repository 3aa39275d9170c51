"""Stopping a run and going on with it."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import assert_same, difference, weights

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.config import AdapterConfig, TrainingConfig
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training import checkpoints
from gsoft_diffusion.training.checkpoints import read_state
from gsoft_diffusion.training.progress import read_progress
from gsoft_diffusion.training.step import TrainingStep
from gsoft_diffusion.training.train import train


@pytest.mark.parametrize(
    "changes",
    [
        {"with_prior_preservation": True, "num_class_images": 3, "random_flip": True, "offset_noise": 0.1},
        {"optimizer": "schedulefree"},
        {"with_prior_preservation": True, "prior_target": "base_prediction"},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "gradient_accumulation_steps": 2},
                {"optimizer": "prodigy", "learning_rate": 1.0},
                {"mixed_precision": "bf16"},
                {"cache_latents": False},
                {"quantize_base": "nf4"},
                {"quantize_base": "float8"},
                {"aspect_buckets": True, "with_prior_preservation": True, "num_class_images": 3},
            )
        ),
    ],
    ids=str,
)
def test_resuming_is_exact(config, changes):
    if changes.get("quantize_base") == "nf4":
        pytest.importorskip("bitsandbytes")
    if (library := {"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(changes.get("optimizer"))) is not None:
        pytest.importorskip(library)
    config = replace(config, num_validation_images=1, **changes)
    whole = weights(config, "whole")
    # With more pictures and checkpoints on the way, which must not touch the numbers.
    stopped = replace(config, output_dir=f"{config.output_dir}-stopped", checkpointing_steps=2, validation_steps=1)
    train(stopped)
    folder = Path(stopped.output_dir or "")
    (folder / "adapter.safetensors").unlink()
    state = folder / "checkpoint-4" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])  # so that the latest is the one before
    assert_same(whole, weights(replace(stopped, resume_from_checkpoint="latest")))
    assert read_state(folder / "checkpoint-4")["step"] == 4


def test_checkpoints_are_adapters_too(config):
    folder = train(replace(config, checkpointing_steps=2, checkpoints_total_limit=1)).adapter.parent
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    last = read_adapter(folder / "checkpoint-4" / "adapter.safetensors")
    assert_same(last.tensors, read_adapter(folder / "adapter.safetensors").tensors)
    assert last.training["step"] == 4


def test_more_steps_after_the_end(config):
    train(replace(config, checkpointing_steps=4))
    longer = weights(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))
    assert_same(longer, weights(replace(config, max_train_steps=6), "at-once"))


def test_a_finished_result_is_not_replaced_by_less(config, monkeypatch, capfd):
    """Not by a run that goes on from before its end with fewer steps, nor by one that is stopped before it."""
    config = replace(config, checkpointing_steps=3)
    adapter = train(config).adapter
    before = adapter.read_bytes()
    again = replace(config, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=r"--max_train_steps 3: .* was trained 4 steps and would be replaced by less"):
        train(replace(again, max_train_steps=3))
    original = TrainingStep.loss

    def stopping(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    (adapter.parent / "checkpoint-3").rename(adapter.parent / "checkpoint-2")
    state = read_state(adapter.parent / "checkpoint-2") | {"step": 2}
    monkeypatch.setattr(checkpoints, "read_state", lambda checkpoint: state)
    monkeypatch.setattr(TrainingStep, "loss", stopping)
    result = train(again)
    assert (result.steps, result.interrupted) == (3, True)
    assert adapter.read_bytes() == before
    assert f"note: {adapter} stays as it is, trained 4 steps" in capfd.readouterr().out


def test_a_finished_run_has_nothing_to_do_but_what_is_missing(config):
    config = replace(config, checkpointing_steps=4, num_validation_images=1)
    folder = train(config).adapter.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = replace(config, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=r"the checkpoint has 4 steps, so nothing is left to train; .* more than 4"):
        train(again)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for name in ("adapter.safetensors", "README.md", "validation/step-000004.png"):
        (folder / name).unlink()
        train(again)
        assert (folder / name).exists()
    assert (folder / "README.md").read_bytes() == before[folder / "README.md"]
    assert_same(read_adapter(folder / "checkpoint-4").tensors, read_adapter(folder).tensors)


def test_another_spelling_of_a_folder_is_no_change(config, monkeypatch):
    train(replace(config, max_train_steps=2, checkpointing_steps=2))
    photos = Path(config.instance_data_dir)
    monkeypatch.chdir(photos)
    again = replace(config, resume_from_checkpoint="latest", max_train_steps=3)
    train(replace(again, instance_data_dir=f"{photos.parent}/./{photos.name}/"))
    train(replace(again, instance_data_dir=".", max_train_steps=4, resume_from_checkpoint="latest"))


def test_resuming_with_other_settings_is_refused_unless_accepted(config):
    config = replace(config, checkpointing_steps=2)
    first = weights(config)
    slower = replace(
        config, resume_from_checkpoint="latest", learning_rate=1e-9, text_encoder_lr=1e-9, max_train_steps=6
    )
    with pytest.raises(UserError, match=r"learning_rate is 1e-09 and was 0\.01, .*--accept_changes"):
        train(slower)
    assert difference(first, weights(replace(slower, accept_changes=True))) < 1e-7  # it does learn at that rate
    after = TrainingConfig.from_dict(read_yaml(Path(config.output_dir or "") / "settings.yaml"))
    assert (after.learning_rate, after.accept_changes) == (1e-9, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": AdapterConfig(nblocks=8)},
        {"optimizer": "schedulefree"},
        {"adapter": AdapterConfig(nblocks=4, text_encoder=False)},
    ],
    ids=str,
)
def test_changes_that_cannot_be_accepted(config, changes):
    if changes.get("optimizer"):
        pytest.importorskip("schedulefree")
    folder = train(replace(config, max_train_steps=1, checkpointing_steps=1)).adapter.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="checkpoint-1 does not fit the settings"):
        train(replace(config, resume_from_checkpoint="latest", accept_changes=True, **changes))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_base_model_is_named_and_the_card_says_so(config, tmp_path, capfd):
    """Trained on meanwhile, in the same folder."""
    base = shutil.copytree(Path(config.pretrained_model_name_or_path).resolve(), tmp_path / "own")
    config = replace(config, max_train_steps=1, checkpointing_steps=1, pretrained_model_name_or_path=str(base))
    train(config)
    unet = load_model(str(base)).unet
    for parameter in unet.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim == 2 else 0
    unet.save_pretrained(base / "unet")
    again = replace(config, resume_from_checkpoint="latest", max_train_steps=2)
    with pytest.raises(
        UserError,
        match=r"the base model has other weights, about [\d.]+% away \(unrelated ones: 140%\); .*accept_changes",
    ):
        train(again)
    accepted = train(replace(again, accept_changes=True)).adapter
    assert "note: compared with the checkpoint's, the base model has other weights, about" in capfd.readouterr().out
    said = read_adapter(accepted).training["other_base"]
    assert said.startswith("has other weights, about")
    assert f"| base model, compared with the first steps' | {said} |" in (accepted.parent / "README.md").read_text()
    train(replace(again, max_train_steps=3))  # it is the run's base model now
    assert read_adapter(accepted).training["other_base"] == said


def test_a_run_that_starts_again_keeps_nothing_of_before(config, capfd):
    """It was killed before its first checkpoint, and has other settings now."""
    config = replace(config, num_validation_images=1, validation_steps=1, checkpointing_steps=0, max_train_steps=3)
    folder = train(config).adapter.parent
    (folder / "adapter.safetensors").unlink()
    (folder / "validation" / "mine.txt").touch()
    train(replace(config, validation_steps=2, resume_from_checkpoint="latest"))
    assert "ended before its first checkpoint; it starts from the beginning" in capfd.readouterr().out
    sheets = [f"step-{step:06d}.png" for step in (2, 3)]
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["mine.txt", *sheets]
    assert [line.step for line in read_progress(folder)] == [1, 2, 3]
    assert len((folder / "progress.jsonl").read_text().splitlines()) == 3


def test_a_run_that_began_from_another_runs_checkpoint_says_so(config):
    checkpoint = train(replace(config, max_train_steps=1, checkpointing_steps=1)).adapter.parent / "checkpoint-1"
    other = replace(config, output_dir=f"{config.output_dir}-2", max_train_steps=2, checkpointing_steps=0)
    folder = train(replace(other, resume_from_checkpoint=str(checkpoint))).adapter.parent
    (folder / "adapter.safetensors").unlink()  # as if it had been killed
    with pytest.raises(UserError, match="there is no checkpoint in"):
        train(replace(other, resume_from_checkpoint="latest"))


def test_a_changed_photo_is_named(config):
    train(replace(config, max_train_steps=1, checkpointing_steps=1))
    photo = Path(config.instance_data_dir) / "1.png"
    Image.open(photo).rotate(90, expand=True).save(photo)
    Image.open(photo).save(photo.with_name("9.png"))
    with pytest.raises(UserError, match=r"checkpoint-1: photos/9\.png is new, photos/1\.png is \w+ and was \w+"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_a_changed_caption_is_noticed(config):
    train(replace(config, max_train_steps=1, checkpointing_steps=1))
    (Path(config.instance_data_dir) / "1.txt").write_text("sks asleep")
    with pytest.raises(UserError, match=r"checkpoint-1: photos/1\.png is \w+ and was \w+"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_a_finished_run_is_not_written_over(config):
    adapter = train(config).adapter
    before = adapter.read_bytes()
    with pytest.raises(UserError, match="another run"):
        train(config)
    assert adapter.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_everything_saved(config, monkeypatch, number, capfd):
    whole = weights(config, "whole")
    original = TrainingStep.loss

    def loss(self, batch):
        if self.state.step == 1:
            os.kill(os.getpid(), number)
        return original(self, batch)

    monkeypatch.setattr(TrainingStep, "loss", loss)
    before = signal.getsignal(number)
    result = train(config)
    assert (result.steps, result.interrupted) == (2, True)
    assert signal.getsignal(number) == before
    assert read_adapter(result.adapter).training["step"] == 2
    assert "--resume_from_checkpoint latest" in capfd.readouterr().out
    monkeypatch.setattr(TrainingStep, "loss", original)
    assert_same(whole, weights(replace(config, resume_from_checkpoint="latest")))


def test_a_second_signal_acts_as_usual(config, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background may be without

    def loss(self, batch):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(TrainingStep, "loss", loss)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("form", ["checkpoint-2", "{folder}", "{folder}/checkpoint-2", "latest"])
def test_forms_of_a_checkpoint_to_resume_from(config, capfd, form):
    short = replace(config, max_train_steps=2, checkpointing_steps=2)
    folder = train(short).adapter.parent
    again = replace(short, max_train_steps=3, resume_from_checkpoint=form.format(folder=folder))
    assert train(again).steps == 3
    assert "going on from step 2" in capfd.readouterr().out


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(config):
    train(replace(config, max_train_steps=2, checkpointing_steps=1))
    with pytest.raises(UserError, match=r"checkpoint-9: is not the folder .*has checkpoint-1, checkpoint-2$"):
        train(replace(config, resume_from_checkpoint="checkpoint-9"))
