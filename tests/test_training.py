from __future__ import annotations

import importlib.util
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from hub_stand_in import TOKEN, stand_in
from PIL import Image
from torch import Tensor

from gsoft_diffusion import training
from gsoft_diffusion.adapter_file import load_adapter, read_adapter
from gsoft_diffusion.checkpoints import read_state
from gsoft_diffusion.config import AdapterConfig, Concept, SamplerConfig, TrainingConfig
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.families import whole_view
from gsoft_diffusion.models import load_models
from gsoft_diffusion.options import parse
from gsoft_diffusion.pictures import save_png
from gsoft_diffusion.settings import read_yaml
from gsoft_diffusion.training import Run, instance_photos, train


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


def weights(config: TrainingConfig, folder: str | None = None) -> dict[str, Tensor]:
    """The adapter that a run with these settings ends with."""
    changed = replace(config, output_dir=f"{config.output_dir}-{folder}") if folder else config
    return read_adapter(train(changed).adapter).tensors


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


# The result


def test_a_run_leaves_an_adapter_that_loads_and_its_settings(config):
    result = train(config)
    folder = Path(config.output_dir or "")
    assert (result.adapter, result.steps, result.interrupted) == (folder / "adapter.safetensors", 4, False)
    models = load_models(config.pretrained_model_name_or_path)
    adapter, file = load_adapter(result.adapter, models.unet, [models.text_encoder])
    assert all(parameter.abs().max() > 0 for parameter in adapter.parameters())
    assert adapter.orthogonality_error() < 1e-5
    assert file.prompts["instance_prompt"] == "a photo of a sks dog"
    assert file.training["sampler"]["scheduler"] == "DDIMScheduler"
    assert file.training["resolution"] == 32
    settings = TrainingConfig.from_dict(read_yaml(folder / "settings.yaml"))
    assert settings == replace(config, resolution=32, text_encoder_lr=2e-5, sampler=settings.sampler).resolved()


def test_an_adapter_does_not_tell_where_the_photos_were(config):
    content = train(config).adapter.read_bytes()
    assert config.instance_data_dir.encode() not in content
    assert b"instance_data_dir" not in content


def test_trainables_of_all_parts_move(config):
    tensors = weights(config)
    for name, tensor in tensors.items():
        start = torch.ones(()) if name.endswith("output_scale") else torch.zeros(())
        assert (tensor - start).abs().max() > 0, name
    assert {name.partition(".")[0] for name in tensors} == {"unet", "text_encoder"}


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
                samples = [self.dataset[position] for position in range(1000, 1032)]
                batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
                losses.append(self._loss(batch).item())

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


# Data as people have them


def batches(config: TrainingConfig, monkeypatch) -> tuple[Run, list[dict[str, Tensor]]]:
    """The run that was made of the settings, and the batches that it has trained on."""
    runs, seen = [], []
    original = Run._loss

    def loss(self, batch):
        runs.append(self)
        seen.append(batch)
        return original(self, batch)

    monkeypatch.setattr(Run, "_loss", loss)
    train(config)
    monkeypatch.setattr(Run, "_loss", original)
    return runs[0], seen


def test_a_crop_of_photos_that_need_none_is_said(config, tmp_path, capfd):
    square = tmp_path / "square"
    square.mkdir()
    for index in range(2):
        Image.new("RGB", (40, 40), "red").save(square / f"{index}.png")
    train(replace(config, center_crop=True, instance_data_dir=str(square), output_dir=str(tmp_path / "square-run")))
    assert "--center_crop has no effect" in capfd.readouterr().out
    train(replace(config, center_crop=True))
    assert "--center_crop" not in capfd.readouterr().out


def test_captions_become_prompts(config, monkeypatch, capfd):
    (Path(config.instance_data_dir) / "1.txt").write_text("sks in the snow")
    run, seen = batches(replace(config, with_prior_preservation=True, num_class_images=2), monkeypatch)
    assert run.dataset.prompts == ["a photo of a sks dog", "sks in the snow", "a photo of a dog"]
    drawn = torch.cat([batch["prompt"] for batch in seen])
    assert set(drawn.tolist()) == {0, 1, 2}
    assert torch.equal(drawn == 2, torch.cat([batch["is_prior"] for batch in seen]))
    assert "subject: 4 pictures, 1 with captions; left out: notes.txt" in capfd.readouterr().out


@pytest.mark.parametrize("cache_latents", [True, False])
def test_aspect_buckets(config, monkeypatch, capfd, cache_latents):
    config = replace(config, aspect_buckets=True, with_prior_preservation=True, num_class_images=2)
    config = replace(config, max_train_steps=8, cache_latents=cache_latents)
    _, seen = batches(config, monkeypatch)
    assert "sizes: 32×32 (2), 40×24 (1), 24×40 (1)" in capfd.readouterr().out
    shapes = {tuple(batch["noise"].shape) for batch in seen}
    assert shapes == {(4, 4, 16, 16), (4, 4, 12, 20), (4, 4, 20, 12)}


def test_masks_keep_the_background_out_of_the_gradient(config, monkeypatch):
    """With weight 0 outside of the mask it does not matter what is there to predict."""
    for name, size in (("0", (40, 40)), ("1", (64, 40)), ("2", (40, 64)), ("3", (33, 32))):
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.save(Path(config.instance_data_dir) / f"{name}-masklabel.png")
    config = replace(config, unmasked_weight=0.0, center_crop=True)
    clean = weights(config, "clean")
    original = training.prediction_target

    def disturbed(*arguments):
        target = original(*arguments).clone()
        target[..., target.shape[-1] * 3 // 4 :] += 100
        return target

    monkeypatch.setattr(training, "prediction_target", disturbed)
    assert_same(clean, weights(config, "disturbed"))
    assert difference(clean, weights(replace(config, unmasked_weight=0.5), "weighted")) > 1e-4


def test_masks_that_are_not_used_and_not_there_are_said(config, capfd):
    with pytest.raises(UserError, match=r"--unmasked_weight 0\.1: no photo has a mask"):
        train(replace(config, unmasked_weight=0.1))
    Image.linear_gradient("L").resize((40, 40)).save(Path(config.instance_data_dir) / "0-masklabel.png")
    train(config)
    assert "note: masks are not used" in capfd.readouterr().out


def test_captions_that_do_not_name_the_subject_are_said(config, capfd):
    for name, caption in (("0", "a sks dog asleep"), ("1", "a dog in the snow"), ("2", "sks in the snow")):
        (Path(config.instance_data_dir) / f"{name}.txt").write_text(caption)
    train(replace(config, max_train_steps=1))
    printed = capfd.readouterr().out
    assert 'note: the unique token "sks" is not in the captions of 1.png; the subject is not named there' in printed
    assert 'note: the class word "dog" is not in the captions of 2.png; the subject is not named there' in printed


def test_the_adapter_records_the_name_that_was_trained(config):
    config = replace(config, class_word="teddy bear", instance_prompt="a photo of zwx teddy bear", max_train_steps=1)
    file = read_adapter(train(config).adapter)
    assert (file.subjects[0]["unique_token"], file.subjects[0]["class_word"]) == ("zwx", "teddy bear")


def test_an_adapter_names_no_folder_of_the_base(config, base):
    content = train(replace(config, max_train_steps=1)).adapter.read_bytes()
    assert str(base.parent).encode() not in content


def test_several_subjects_in_one_run(config, monkeypatch, tmp_path, capfd):
    mugs = tmp_path / "mugs"
    mugs.mkdir()
    Image.new("RGB", (40, 40), "red").save(mugs / "0.png")
    Image.new("RGB", (40, 40), "green").save(mugs / "1.png")
    concepts = (Concept(config.instance_data_dir, "dog"), Concept(str(mugs), "mug", "zwx"))
    config = replace(config, instance_data_dir="", class_word=None, concepts_list=concepts)
    config = replace(config, with_prior_preservation=True, num_class_images=2, max_train_steps=6)
    run, seen = batches(config, monkeypatch)
    assert run.dataset.prompts == [f"a photo of a {name}" for name in ("sks dog", "zwx mug", "dog", "mug")]
    drawn = torch.cat([batch["prompt"] for batch in seen])
    assert torch.bincount(drawn).tolist() == [8, 4, 6, 6]  # two epochs of the photos, three of the class images
    printed = capfd.readouterr().out
    assert "subject a zwx mug: 2 pictures" in printed
    assert "class, a photo of a mug: 2 pictures" in printed
    file = read_adapter(Path(config.output_dir or "") / "adapter.safetensors")
    assert [subject["unique_token"] for subject in file.subjects] == ["sks", "zwx"]
    assert str(tmp_path) not in str(file.training)


def in_folders(config: TrainingConfig, first: str, second: str) -> TrainingConfig:
    """Two subjects whose photos are in these folders."""
    concepts = (Concept(first, "dog"), Concept(second, "mug", "zwx"))
    return replace(config, instance_data_dir="", class_word=None, concepts_list=concepts).resolved()


def test_a_photo_of_two_subjects_is_refused(config, tmp_path):
    inside = Path(config.instance_data_dir) / "3_mug"
    inside.mkdir()
    Image.effect_noise((40, 40), 50).save(inside / "mug.png")
    with pytest.raises(
        UserError, match=r"mug\.png: is in the folders of two subjects, .*photos and .*photos/3_mug; give each"
    ):
        instance_photos(in_folders(config, config.instance_data_dir, str(inside)), print)


def test_copies_of_photos_are_said(config, tmp_path, capsys):
    mugs = tmp_path / "mugs"
    mugs.mkdir()
    (mugs / "x.png").write_bytes((Path(config.instance_data_dir) / "0.png").read_bytes())
    instance_photos(in_folders(config, config.instance_data_dir, str(mugs)), print)
    said = f"note: {mugs}/x.png is the same picture as {config.instance_data_dir}/0.png, which counts twice by that"
    assert said in capsys.readouterr().out


def test_a_caption_that_names_another_subject_only_is_refused(config, tmp_path):
    mugs = tmp_path / "mugs"
    mugs.mkdir()
    Image.effect_noise((40, 40), 50).save(mugs / "mug.png")
    given = in_folders(config, config.instance_data_dir, str(mugs))
    (mugs / "mug.txt").write_text("a sks dog and a zwx mug")
    assert len(instance_photos(given, print)) == 5
    (mugs / "mug.txt").write_text("a sks dog")
    with pytest.raises(
        UserError, match=r'mug\.png: its caption names "sks", the subject in .*, and not "zwx"; correct'
    ):
        instance_photos(given, print)


def test_a_class_word_that_the_prompt_does_not_have_is_said(config, capsys):
    instance_photos(replace(config, instance_prompt="a photo of a zwx cat").resolved(), print)
    assert 'note: the class word "dog" is not in the instance prompt' in capsys.readouterr().out


def test_drawn_pictures_among_the_photos_are_said(config, capsys):
    save_png(Image.effect_noise((40, 40), 50), Path(config.instance_data_dir), "{}.png", 7, {"prompt": "a dog"})
    instance_photos(config.resolved(), print)
    assert "subject: 5 pictures, 1 drawn by this program and not photographed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["instance_data_dir", "class_data_dir"])
def test_a_folder_of_pictures_is_no_output_folder(config, tmp_path, name):
    given = replace(config, with_prior_preservation=True, class_data_dir=str(tmp_path / "class"))
    with pytest.raises(UserError, match=r"--output_dir .*: is the folder of (a subject's photos|class images)"):
        train(replace(given, output_dir=f"{getattr(given, name)}/"))


def test_other_words_of_kohyas_folders_are_said(config, capsys):
    inside = Path(config.instance_data_dir) / "10_zwx dog"
    Path(config.instance_data_dir, "0.png").rename((inside.mkdir() or inside) / "0.png")
    instance_photos(config.resolved(), print)
    assert (
        'say "zwx dog"; photos there without a caption are trained as "a photo of a sks dog"' in capsys.readouterr().out
    )
    inside.rename(inside.with_name("10_Sks dog"))
    instance_photos(config.resolved(), print)
    assert "all the same" not in capsys.readouterr().out


def test_a_subjects_photo_among_the_class_images_is_refused(config, tmp_path):
    own = tmp_path / "class"
    own.mkdir()
    (own / "copy.png").write_bytes((Path(config.instance_data_dir) / "1.png").read_bytes())
    config = replace(config, with_prior_preservation=True, class_data_dir=str(own), num_class_images=1)
    with pytest.raises(
        UserError, match=r"copy\.png: is the same picture as the photo .*1\.png; take it out of the class images"
    ):
        train(config)


def test_class_images_that_are_not_used_are_said(config, tmp_path, capfd):
    own = tmp_path / "class"
    own.mkdir()
    for number in range(9):
        image = Image.effect_noise((40, 40), 50 + number)
        image.putalpha(image.copy())
        image.save(own / f"{number}.png")
    config = replace(config, with_prior_preservation=True, class_data_dir=str(own), num_class_images=7)
    train(replace(config, max_train_steps=1))
    printed = capfd.readouterr().out
    assert "class: 7 pictures; 2 more than asked for are not used" in printed  # nor is there a word of masks
    assert "note: this run is too short for 5 of its class images" in printed


def test_a_run_encodes_what_it_shows(config, monkeypatch):
    """Crops, flips and sizes of a few photos are many; a short run encodes few."""
    config = replace(config, aspect_buckets=True, random_flip=True, max_train_steps=2, checkpointing_steps=1)
    run, seen = batches(replace(config, train_batch_size=2), monkeypatch)
    assert all("moments" in batch for batch in seen)
    assert "pixels" in run.dataset[10_000]  # of another batch, whose photo has another crop


# Same result by other ways


def test_same_seed_same_weights_other_seed_other_weights(config):
    first = weights(config, "first")
    assert_same(first, weights(config, "second"))
    assert difference(first, weights(replace(config, seed=1), "third")) > 1e-4


def test_repeating_a_run_from_its_output_folder_gives_the_same_weights_and_pixels(config):
    from gsoft_diffusion.config import GenerationConfig
    from gsoft_diffusion.generation import draw

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


@pytest.mark.parametrize("prior", [False, True])
def test_accumulated_batches_equal_a_large_one(config, prior):
    config = replace(config, train_batch_size=4)
    if prior:
        config = replace(config, with_prior_preservation=True, num_class_images=2)
    accumulated = replace(config, train_batch_size=1, gradient_accumulation_steps=4)
    assert (
        difference(weights(config, "large"), weights(accumulated, "accumulated")) < 1e-3
    )  # Adam divides by tiny numbers


def test_gradient_checkpointing_changes_nothing(config):
    checkpointed = weights(replace(config, gradient_checkpointing=True), "checkpointed")
    assert difference(weights(config, "plain"), checkpointed) < 1e-4


@pytest.mark.parametrize("text_encoder", [True, False])
def test_prompt_embeddings_are_those_of_the_prompts(config, text_encoder):
    from gsoft_diffusion.injection import inject

    models = load_models(config.pretrained_model_name_or_path)
    expected = models.encode_prompts(["a dog", "a cat"])["encoder_hidden_states"]
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=text_encoder), models.unet, [models.text_encoder])
    denoiser = training.Denoiser(models, adapter, ["a dog", "a cat"])
    latents, timesteps = torch.randn(3, 4, 16, 16), torch.tensor([1, 2, 3])
    prediction = denoiser(latents, timesteps, torch.tensor([1, 0, 1]), whole_view(32, 32).repeat(3, 1))
    wanted = models.unet(latents, timesteps, encoder_hidden_states=expected[[1, 0, 1]]).sample
    torch.testing.assert_close(prediction, wanted)
    trained = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert trained == {f"adapter.{name}" for name, _ in adapter.named_parameters()}


# Optimizers and precision


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"optimizer": "schedulefree", "lr_warmup_steps": 2},
        {"optimizer": "adamw", "lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"optimizer": "adamw", "snr_gamma": 5.0, "offset_noise": 0.1, "max_grad_norm": 0.0},
        {"mixed_precision": "bf16"},
        {"adapter": AdapterConfig(block_size=2, double=False, output_scale=False, parametrization="exp")},
        {"attention_backend": "native"},
        {"center_crop": True, "random_flip": True, "resolution": 36},
        {"train_batch_size": 7},
        {"mixed_precision": "fp16"},
    ],
    ids=str,
)
def test_settings_that_train(config, changes):
    if (library := {"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(changes.get("optimizer"))) is not None:
        pytest.importorskip(library)
    tensors = weights(replace(config, **changes))
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert max(tensor.abs().max() for tensor in tensors.values()) > 0


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")],
)
def test_a_missing_library_is_named(config, monkeypatch, optimizer, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(UserError, match=f"--optimizer {optimizer}.*pip install {package}"):
        train(replace(config, optimizer=optimizer, learning_rate=1.0))


def test_weight_decay_leaves_scales_alone(config):
    models = load_models(config.pretrained_model_name_or_path)
    adapter = training.inject(config.adapter, models.unet, [models.text_encoder])
    optimizer = training.make_optimizer(replace(config, adam_weight_decay=0.5), adapter)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(adapter.parameters()))
    for name, parameter in adapter.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("output_scale") else 0.5)


@pytest.mark.parametrize(
    ("given", "optimizer", "expected"),
    [(None, "adamw", 2e-5), (0.25, "adamw", 0.25), (None, "prodigy", 1.0)],
)
def test_text_encoders_have_a_learning_rate_of_their_own(config, given, optimizer, expected):
    pytest.importorskip("prodigyopt")
    models = load_models(config.pretrained_model_name_or_path)
    config = replace(config, learning_rate=1.0, text_encoder_lr=given, optimizer=optimizer)
    config = training.with_model_defaults(config, models)
    adapter = training.inject(config.adapter, models.unet, [models.text_encoder])
    made = training.make_optimizer(config, adapter)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    for name, parameter in adapter.named_parameters():
        assert rates[id(parameter)] == (expected if name.startswith("text_encoder") else 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_backend": "telepathy"}, "--attention_backend telepathy"),
        ({"report_to": "telepathy"}, "--report_to telepathy"),
        ({"adapter": AdapterConfig(nblocks=5)}, "32"),
        ({"resolution": 33}, "--resolution 33"),
        ({"sampler": SamplerConfig(scheduler="Telepathy")}, "Telepathy"),
        ({"instance_data_dir": "nowhere"}, "--instance_data_dir nowhere"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere"),
    ],
)
def test_settings_that_cannot_work_leave_nothing_behind(config, changes, message):
    with pytest.raises(UserError, match=message):
        train(replace(config, **changes))
    assert not Path(config.output_dir or "").exists()


# Checkpoints, resuming, stopping


@pytest.mark.parametrize(
    "changes",
    [
        {"with_prior_preservation": True, "num_class_images": 3, "random_flip": True, "offset_noise": 0.1},
        {"optimizer": "schedulefree"},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "gradient_accumulation_steps": 2},
                {"optimizer": "prodigy", "learning_rate": 1.0},
                {"mixed_precision": "bf16"},
                {"cache_latents": False},
                {"quantize_base": "nf4"},
                {"aspect_buckets": True, "with_prior_preservation": True, "num_class_images": 3},
            )
        ),
    ],
    ids=str,
)
def test_resuming_is_exact(config, changes):
    if "quantize_base" in changes:
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
    original = Run._loss

    def stopping(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    (adapter.parent / "checkpoint-3").rename(adapter.parent / "checkpoint-2")
    state = read_state(adapter.parent / "checkpoint-2") | {"step": 2}
    monkeypatch.setattr(training.checkpoints, "read_state", lambda checkpoint: state)
    monkeypatch.setattr(Run, "_loss", stopping)
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


def test_what_was_trained_elsewhere_with_relative_paths_is_drawn_and_exported_from_anywhere(
    config, base, tmp_path, monkeypatch, capfd
):
    from gsoft_diffusion.config import ExportConfig, GenerationConfig
    from gsoft_diffusion.export import export
    from gsoft_diffusion.generation import draw

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mini").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    config = replace(config, instance_data_dir="photos", pretrained_model_name_or_path="models/mini", output_dir="dog")
    adapter = train(replace(config, checkpointing_steps=2)).adapter.absolute()
    printed = capfd.readouterr().out
    script = Path(training.__file__).parent.parent / "inference.py"
    assert f"try it: python {script} --adapter dog/adapter.safetensors --prompt" in printed
    file = read_adapter(adapter)
    assert (file.base_model.name, file.training["pretrained_model_name_or_path"]) == ("mini", "mini")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for trained in (adapter, adapter.parent / "checkpoint-2"):
        draw(GenerationConfig((str(trained),), prompts=("a {0} {1}",), num_images=1))
        card = export(ExportConfig((str(trained),), "checkpoint")).with_suffix(".md").read_text()
        assert "models" not in card.replace("whole models", "").partition("## Licence")[0]
        assert "| base model | mini |" in card
    assert sorted(path.name for path in adapter.parent.glob("merged*.safetensors")) == [
        "merged.safetensors",
        "merged_checkpoint-2.safetensors",
    ]
    assert f"base model: {tmp_path}/models/mini, as {adapter.parent}/settings.yaml says" in capfd.readouterr().out


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
    original = Run._loss

    def loss(self, batch):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return original(self, batch)

    monkeypatch.setattr(Run, "_loss", loss)
    before = signal.getsignal(number)
    result = train(config)
    assert (result.steps, result.interrupted) == (2, True)
    assert signal.getsignal(number) == before
    assert read_adapter(result.adapter).training["step"] == 2
    assert "--resume_from_checkpoint latest" in capfd.readouterr().out
    monkeypatch.setattr(Run, "_loss", original)
    assert_same(whole, weights(replace(config, resume_from_checkpoint="latest")))


@pytest.mark.parametrize(("at", "steps"), [(2, 3), (4, 4)])
def test_a_request_to_stop_does_not_wait_for_a_validation_sheet(config, monkeypatch, at, steps):
    """At step 2 the run stops after the next one; at its end it is complete, card and all, without the last sheet."""
    original = training.generate
    drawn = []

    def generate(*arguments, **options):
        for sample in original(*arguments, **options):
            drawn.append(sample)
            if len(drawn) == at:  # with two pictures a sheet: the last of the first, the last of the second
                os.kill(os.getpid(), signal.SIGTERM)
            yield sample

    monkeypatch.setattr(training, "generate", generate)
    prompts = ("a dog", "a sks dog")
    changes = {"num_validation_images": 1, "validation_prompts": prompts, "validation_steps": 2, "sample_batch_size": 1}
    result = train(replace(config, **changes))
    folder = Path(config.output_dir or "")
    assert (result.steps, result.interrupted) == (steps, steps < 4)
    assert [path.name for path in (folder / "validation").glob("*")] == (["step-000002.png"] if at == 4 else [])
    assert (folder / "README.md").exists()


def test_a_second_signal_acts_as_usual(config, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background may be without

    def loss(self, batch):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(Run, "_loss", loss)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step_named(config, monkeypatch, bad):
    original = training.training_loss
    calls = []

    def loss(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options) * (bad if len(calls) == 3 else 1.0)

    monkeypatch.setattr(training, "training_loss", loss)
    with pytest.raises(UserError, match="step 3: the loss is not finite; checkpoint-2 is kept"):
        train(replace(config, checkpointing_steps=2))
    state = read_state(Path(config.output_dir or "") / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in state["adapter"].values())


def test_a_gradient_that_is_not_finite_stops_with_the_step_named(config, monkeypatch):
    original = training.training_loss
    monkeypatch.setattr(training, "training_loss", lambda *a, **k: (original(*a, **k) * 1e38) * 1e-38 * torch.ones(()))
    original_clip = training.Accelerator.clip_grad_norm_

    def clip(self, parameters, max_norm):
        parameters = list(parameters)
        parameters[0].grad[:] = float("nan")
        return original_clip(self, parameters, max_norm)

    monkeypatch.setattr(training.Accelerator, "clip_grad_norm_", clip)
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

    plain = training.make_optimizer

    def make_optimizer(*arguments):
        optimizer = plain(*arguments)
        for group in optimizer.param_groups:  # as on GPUs; a fused step would look at the overflow by itself
            group["fused"] = False
        optimizer._step_supports_amp_scaling = False
        return optimizer

    monkeypatch.setattr(training, "make_accelerator", make_accelerator)
    monkeypatch.setattr(training, "make_optimizer", make_optimizer)
    return scaler


def test_skipped_steps_are_counted_shown_and_resumed(config, fp16_scaler, monkeypatch, capfd):
    config = replace(config, mixed_precision="fp16", checkpointing_steps=2)
    original = training.training_loss
    monkeypatch.setattr(training, "training_loss", lambda *a, **k: original(*a, **k) * 1e30)  # overflows when scaled
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
    original = training.training_loss
    monkeypatch.setattr(training, "training_loss", lambda *a, **k: original(*a, **k) * 1e30)
    lines = learned(replace(config, mixed_precision="fp16"), capfd)
    assert len(lines) == 2
    assert all("all steps were skipped; use --mixed_precision bf16" in line for line in lines)


@pytest.mark.parametrize(("settings", "steps"), [(["--gradient_accumulation_steps", "2"], 2), ([], 3)])
def test_the_launchers_accumulation_is_the_runs(config, monkeypatch, tmp_path, settings, steps):
    path = tmp_path / "settings.yaml"
    given = {name: value for name, value in config.to_dict().items() if name != "gradient_accumulation_steps"}
    path.write_text(yaml.safe_dump(given))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(steps))
    result = train(parse(TrainingConfig, "", ["--config", str(path), *settings]))
    assert (result.steps, result.interrupted) == (4, False)
    assert read_yaml(result.adapter.parent / "settings.yaml")["gradient_accumulation_steps"] == steps
    with pytest.raises(UserError, match="--gradient_accumulation_steps 1: ACCELERATE_GRADIENT_ACCUMULATION_STEPS says"):
        train(replace(config, output_dir=f"{config.output_dir}-other"))


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


# What is for others


def test_a_model_card_is_written_with_the_result(config, tmp_path):
    folder = train(replace(config, num_validation_images=1)).adapter.parent
    card = (folder / "README.md").read_text()
    assert "instance_prompt: a photo of a sks dog" in card
    assert "](validation/step-000004.png)" in card
    assert "| steps | 4 |" in card
    assert str(tmp_path) not in card
    assert str(Path(config.pretrained_model_name_or_path).parent) not in card


def test_a_card_of_ones_own_stays(config, capfd):
    config = replace(config, checkpointing_steps=4)
    card = train(config).adapter.parent / "README.md"
    card.write_text("my own words")
    train(replace(config, resume_from_checkpoint="latest", max_train_steps=5))
    assert card.read_text() == "my own words"
    assert "stays as you wrote it" in capfd.readouterr().out


@pytest.fixture
def hub(monkeypatch):
    with stand_in() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        yield server


def test_the_result_is_published_and_the_token_kept_nowhere(config, hub, capfd):
    config = replace(config, push_to_hub=True, hub_token=TOKEN, checkpointing_steps=2, report_to="tensorboard")
    folder = train(config).adapter.parent
    assert {"README.md", "adapter.safetensors"} <= hub.repositories["ann/dog"].keys()
    assert f"published: {hub.address}/ann/dog" in capfd.readouterr().out
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    train(replace(config, hub_token=TOKEN, resume_from_checkpoint="latest", max_train_steps=5, hub_model_id="cat"))
    assert set(hub.repositories) == {"ann/dog", "ann/cat"}


def test_what_keeps_from_publishing_is_said_before_the_training(config, hub):
    with pytest.raises(UserError, match="--hub_model_id dog: cannot be made"):
        train(replace(config, push_to_hub=True, hub_token="hf_wrong"))
    assert not Path(config.output_dir or "").exists()


def test_an_upload_that_fails_leaves_the_result(config, hub):
    hub.broken = {"/commit/main"}
    with pytest.raises(UserError, match=r"to try again: hf upload ann/dog"):
        train(replace(config, push_to_hub=True, hub_token=TOKEN))
    assert read_adapter(Path(config.output_dir or "") / "adapter.safetensors").training["step"] == 4


# What is shown


def test_validation_writes_a_sheet_every_so_many_steps_and_at_the_end(config):
    config = replace(config, num_validation_images=2, validation_steps=2, max_train_steps=5)
    folder = train(config).adapter.parent / "validation"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:06d}.png" for step in (2, 4, 5)]
    first, last = (np.asarray(Image.open(folder / f"step-{step:06d}.png"), dtype=int) for step in (2, 5))
    assert first.shape == last.shape
    assert np.abs(first[40:] - last[40:]).max() > 10  # below the title


def test_validation_shows_what_inference_draws(config):
    from gsoft_diffusion.config import GenerationConfig
    from gsoft_diffusion.generation import draw

    config = replace(config, num_validation_images=2, validation_prompts=("a sks dog on the beach",))
    adapter = train(config).adapter
    (sheet,) = draw(GenerationConfig((str(adapter),), prompts=config.validation_prompts or (), num_images=2))
    drawn = np.asarray(Image.open(sheet).convert("RGB"), dtype=int)
    validated = np.asarray(Image.open(adapter.parent / "validation" / "step-000004.png").convert("RGB"), dtype=int)
    assert drawn.shape == validated.shape
    assert np.abs(drawn[40:] - validated[40:]).max() <= 2  # below the titles; enlarging may double a difference of 1


def test_tensorboard_gets_loss_rate_and_pictures(config):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(config, report_to="tensorboard", num_validation_images=1, validation_steps=2)
    folder = train(config).adapter.parent / "logs" / "training"
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([1e-2] * 4)
    assert [event.step for event in events.Images("validation")] == [2, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("step-000004.png", r"cannot write .*step-000004\.png: No space left on device; checkpoints are intact"),
        ("README.md", r"cannot write .*README\.md: No space left on device; the adapter is in .*adapter\.safetensors"),
    ],
)
def test_what_a_full_disk_stops_is_named(config, monkeypatch, name, message):
    original = training.whole_file

    def whole_file(path):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return original(path)

    monkeypatch.setattr(training, "whole_file", whole_file)
    with pytest.raises(UserError, match=message):
        train(replace(config, num_validation_images=1))
    assert (Path(config.output_dir or "") / "adapter.safetensors").exists()


@pytest.mark.parametrize("method", ["init_trackers", "log", "end_training"])
def test_a_tracker_that_cannot_write_does_not_end_the_run(config, monkeypatch, capfd, method):
    calls = []

    def full(*arguments, **options):
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"accelerate.Accelerator.{method}", full)
    assert train(replace(config, report_to="tensorboard")).steps == 4
    assert calls
    noted = "note: tensorboard cannot write ([Errno 28] No space left on device)" in capfd.readouterr().out
    assert noted == (method != "end_training")


@pytest.mark.filterwarnings("ignore:.*no supported trackers:UserWarning")
def test_a_tracker_that_is_not_installed_is_said(config, capfd, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.is_tensorboard_available", lambda: False)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    train(replace(config, report_to="tensorboard"))
    assert "pip install tensorboard" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("report_to", "missing"), [("tensorboard, wandb", ["wandb"]), ("TensorBoard", []), ("comet_ml,none", None)]
)
def test_several_trackers(config, capfd, report_to, missing):
    pytest.importorskip("tensorboard")
    if missing is None:
        with pytest.raises(UserError, match="--report_to comet_ml,none: none, and others"):
            train(replace(config, report_to=report_to))
        return
    folder = train(replace(config, report_to=report_to)).adapter.parent
    assert list((folder / "logs" / "training").iterdir())
    noted = [line for line in capfd.readouterr().out.splitlines() if "is not installed" in line]
    assert [line.split()[1] for line in noted] == [name for name in missing if not importlib.util.find_spec(name)]


def test_a_service_that_refuses_does_not_end_the_run(config, monkeypatch, capfd):
    def refused(*arguments, **options):
        raise ValueError("no API key")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refused)
    assert train(replace(config, report_to="tensorboard")).steps == 4
    assert "note: tensorboard cannot write (no API key); no more is reported to it" in capfd.readouterr().out


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


def test_steps_and_learning_rate_follow_from_the_size_of_the_base(base, config, monkeypatch):
    models = load_models(str(base))
    open_ = replace(config, max_train_steps=None, learning_rate=None).resolved()
    miniature = training.with_model_defaults(open_, models)
    monkeypatch.setattr(training, "MINIATURE_BELOW", models.resolution)
    full_size = training.with_model_defaults(open_, models)
    assert (full_size.max_train_steps, full_size.learning_rate) == (3000, 2e-5)
    assert miniature.max_train_steps < full_size.max_train_steps
    assert miniature.learning_rate > full_size.learning_rate
    assert training.with_model_defaults(config.resolved(), models).max_train_steps == config.max_train_steps
