from __future__ import annotations

import unicodedata
from dataclasses import fields, replace
from pathlib import Path

import pytest

from gsoft_diffusion.config import AdapterConfig, Concept, ExportConfig, GenerationConfig, SamplerConfig, TrainingConfig
from gsoft_diffusion.config.prompts import with_article
from gsoft_diffusion.config.settings import field_help
from gsoft_diffusion.foundation.errors import UserError


@pytest.mark.parametrize(
    "config_class", [AdapterConfig, SamplerConfig, Concept, TrainingConfig, GenerationConfig, ExportConfig]
)
def test_every_field_is_documented_and_nothing_else_is(config_class):
    assert list(field_help(config_class)) == [field.name for field in fields(config_class)]


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig("photos", class_word="dog"),
        TrainingConfig("photos", instance_prompt="x", adapter=AdapterConfig(block_size=4, nfactors="dense")).resolved(),
        TrainingConfig(concepts_list=(Concept("a", "dog"), Concept("b", "cat", "zwx"))).resolved(),
        GenerationConfig(("adapter.safetensors",), prompts=("a", "b"), compare=True),
        ExportConfig(("adapter.safetensors",), "kohya_lora", rank=8),
        SamplerConfig(guidance_scale=1.0, scheduler="DDIMScheduler"),
    ],
)
def test_round_trip(config):
    assert type(config).from_dict(config.to_dict()) == config


def test_prompts_follow_from_the_class_word():
    config = TrainingConfig("some/photos", class_word="dog").resolved()
    assert config.instance_prompt == "a photo of a sks dog"
    assert config.class_prompt == "a photo of a dog"
    assert config.validation_prompts is not None
    assert config.validation_prompts[:2] == ("a photo of a sks dog", "a sks dog on the beach")
    assert config.output_dir == "outputs/photos"


def test_prompts_that_are_given_stay():
    config = TrainingConfig(
        "photos", instance_prompt="mine", class_prompt="theirs", validation_prompts=("v",), with_prior_preservation=True
    )
    resolved = config.resolved()
    assert (resolved.instance_prompt, resolved.class_prompt, resolved.validation_prompts) == ("mine", "theirs", ("v",))


def test_scenes_are_not_made_up_for_a_name_that_is_not_known():
    config = TrainingConfig("photos", class_word="dog", instance_prompt="a photo of zwx").resolved()
    assert config.validation_prompts == ("a photo of zwx",)


@pytest.mark.parametrize(
    ("prompt", "class_word", "token"),
    [
        ("a photo of a zwx teddy bear", "teddy bear", "zwx"),
        ("a photo of zwx dog on the beach", "dog", "zwx"),
        ("zwx Dog", "dog", "zwx"),
        ("portrait of a sks qrs dog, smiling", "dog", "sks qrs"),
        ("a photo of <zwx> dog's head", "dog", "<zwx>"),
        ("a photo of a dog", "dog", None),
        ("a photo of my dog", "dog", None),
        ("zwx, dog", "dog", None),
        ("a photo of zwx", "dog", None),
        ("a photo of zwx dogs", "dog", None),
        ("a photo of zwx", None, None),
    ],
)
def test_the_token_that_is_trained_is_the_one_that_is_recorded(prompt, class_word, token):
    concept = TrainingConfig("photos", class_word=class_word, instance_prompt=prompt).resolved().concepts[0]
    assert concept.unique_token == token
    assert concept.resolved() == concept


def test_a_token_that_is_not_in_the_prompt_is_refused():
    config = TrainingConfig("photos", class_word="dog", instance_prompt="a photo of a zwx dog", unique_token="sks")
    with pytest.raises(UserError, match=r"--unique_token sks: is not in the --instance_prompt .*another name"):
        config.resolved()
    assert replace(config, instance_prompt="a photo of sks, a dog").resolved().unique_token == "sks"


def test_a_token_that_says_nothing_is_refused():
    with pytest.raises(UserError, match="--unique_token dog: is the class word"):
        TrainingConfig("photos", "dog", "dog").resolved()
    with pytest.raises(UserError, match="--unique_token : must be more than blanks"):
        TrainingConfig("photos", "dog", " ").resolved()


def test_validation_prompts_have_the_subjects_name_filled_in():
    config = TrainingConfig("photos", class_word="mug", unique_token="zwx", validation_prompts=("a {0} {1} in snow",))
    assert config.resolved().validation_prompts == ("a zwx mug in snow",)
    with pytest.raises(UserError, match=r"\{0\} cannot be filled in: the subject's unique_token is not known"):
        replace(config, unique_token=None, instance_prompt="my mug").resolved()


def test_scenes_call_the_subject_as_its_prompt_does():
    config = TrainingConfig("photos", class_word="mug", instance_prompt="a picture of a zwx mug").resolved()
    assert config.validation_prompts is not None
    assert config.validation_prompts[:2] == ("a picture of a zwx mug", "a zwx mug on the beach")


def test_the_home_folder_is_filled_in_wherever_a_path_may_stand(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    paths = ("instance_data_dir", "class_data_dir", "output_dir", "pretrained_model_name_or_path", "base_config")
    given = {"class_word": "dog", "with_prior_preservation": True, "resume_from_checkpoint": "~/r"}
    training = TrainingConfig(**given, **dict.fromkeys(paths, "~/x.safetensors"))
    assert {getattr(training, name) for name in paths} == {"/home/ann/x.safetensors"}
    assert training.resume_from_checkpoint == "/home/ann/r"
    concept = Concept.from_dict({"instance_data_dir": "~/x", "class_word": "dog", "class_data_dir": "~/y"})
    assert (concept.instance_data_dir, concept.class_data_dir) == ("/home/ann/x", "/home/ann/y")
    paths = ("prompts_file", "output_dir", "pretrained_model_name_or_path")
    drawing = GenerationConfig(("~/a", "b"), **dict.fromkeys(paths, "~/x"))
    assert {getattr(drawing, name) for name in paths} == {"/home/ann/x"}
    assert drawing.adapter == ("/home/ann/a", "b")
    export = ExportConfig(("~/a",), "diffusers", output="~/x")
    assert (export.adapter, export.output) == (("/home/ann/a",), "/home/ann/x")


def test_the_home_folder_of_nobody_is_refused():
    with pytest.raises(UserError, match=r"--output ~nobody-here/x: there is no user ~nobody-here; .* give \./~nobody"):
        ExportConfig(("a",), "diffusers", output="~nobody-here/x")


def test_paths_are_found_in_another_normal_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept, given = (unicodedata.normalize(form, "Hündin") for form in ("NFD", "NFC"))
    Path(kept).mkdir()
    drawing = GenerationConfig((f"{given}/checkpoint-2", "b"), output_dir=f"{given}/new")
    assert drawing.adapter == (f"{kept}/checkpoint-2", "b")
    assert drawing.output_dir == f"{kept}/new"


@pytest.mark.parametrize("given", ["a teddy bear", "The  teddy bear ", "teddy bear", " teddy\nbear"])
def test_class_words_without_articles(given):
    concept = TrainingConfig("photos", class_word=given).resolved().concepts[0]
    assert concept.class_word.casefold() == "teddy bear"
    assert concept.instance_prompt.casefold() == "a photo of a sks teddy bear"
    assert concept.class_prompt.casefold() == "a photo of a teddy bear"
    assert concept.resolved() == concept


def test_the_subjects_name_is_filled_in_into_its_prompts():
    config = TrainingConfig("p", "dog", None, "a {0} {1}", "one {1}", with_prior_preservation=True).resolved()
    assert (config.instance_prompt, config.class_prompt, config.unique_token) == ("a sks dog", "one dog", "sks")
    config = TrainingConfig("p", unique_token="zwx", instance_prompt="my {0}").resolved()
    assert (config.instance_prompt, config.unique_token) == ("my zwx", "zwx")
    with pytest.raises(UserError, match=r"\{1\} cannot be filled in"):
        TrainingConfig("p", instance_prompt="a {1}").resolved()


def test_a_subject_is_not_called_as_the_class_that_is_kept():
    given = {"instance_prompt": "A photo of  a dog", "class_word": "dog"}
    assert TrainingConfig("p", **given).resolved().instance_prompt == "A photo of  a dog"
    with pytest.raises(UserError, match="--instance_prompt A photo of a dog: is also the prompt of a class"):
        TrainingConfig("p", **given, with_prior_preservation=True)
    concepts = (Concept("my/dog", "dog"), Concept("my/cat", "cat", instance_prompt="a photo of a dog"))
    with pytest.raises(UserError, match="--instance_prompt a photo of a dog: is also"):
        TrainingConfig(concepts_list=concepts, with_prior_preservation=True)


def test_an_export_of_nothing_is_refused():
    with pytest.raises(UserError, match="--strength 0: would give the base model itself"):
        ExportConfig(("a", "b"), "diffusers", (0.0, 0.0))


def test_several_subjects():
    concepts = (
        Concept("my/dog", "dog"),
        Concept("my/mug", "mug", "zwx", class_prompt="mugs"),
        Concept("c", None, None, "y"),
    )
    config = TrainingConfig(concepts_list=concepts).resolved()
    assert [concept.instance_prompt for concept in config.concepts] == [
        "a photo of a sks dog",
        "a photo of a zwx mug",
        "y",
    ]
    assert [concept.class_prompt for concept in config.concepts] == ["a photo of a dog", "mugs", None]
    assert config.validation_prompts == (
        "a photo of a sks dog",
        "a sks dog on the beach",
        "a photo of a zwx mug",
        "a zwx mug on the beach",
        "y",
    )
    assert config.output_dir == "outputs/dog_and_mug_and_c"
    assert config.resolved() == config


def test_subjects_may_share_what_means_the_same():
    dogs = (replace(DOG, class_data_dir="dogs"), Concept("other", "dog", "zwx", class_data_dir="dogs"))
    assert len(TrainingConfig(concepts_list=dogs).concepts) == 2
    named = (Concept("a", "dog", instance_prompt="a zwx dog"), Concept("b", "dog", instance_prompt="a qvx dog"))
    assert len(TrainingConfig(concepts_list=named).concepts) == 2  # nobody uses the default token


def test_prompts_have_one_normal_form():
    twice = [
        TrainingConfig("photos", f"H{u}ndin", f"sk{u}", validation_prompts=(u,)).resolved() for u in ("ü", "u\u0308")
    ]
    assert twice[0] == twice[1]


def test_a_single_subject_is_a_concept_too():
    (concept,) = (
        TrainingConfig("photos", class_word="dog", class_data_dir="dogs", with_prior_preservation=True)
        .resolved()
        .concepts
    )
    assert concept == Concept("photos", "dog", "sks", "a photo of a sks dog", "a photo of a dog", "dogs")


DOG, CAT = Concept("dog", "dog"), Concept("cat", "cat", "zwx")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concepts_list": (DOG, CAT), "instance_data_dir": "dog"}, "--instance_data_dir: describes one subject"),
        ({"concepts_list": (DOG, CAT), "unique_token": "zwx"}, "--unique_token: describes one subject"),
        ({"concepts_list": (DOG, Concept("dog", "cat", "zwx"))}, "instance_data_dir dog comes twice"),
        (
            {"concepts_list": (DOG, Concept("./x/../dog/", "cat", "zwx"))},
            r"instance_data_dir \./x/\.\./dog/ comes twice",
        ),
        ({"concepts_list": (DOG, Concept("cat", "cat"))}, "unique_token sks comes twice"),
        ({"concepts_list": (DOG, Concept("cat", "cat", "SKS"))}, "unique_token SKS comes twice"),
        (
            {"concepts_list": (DOG, Concept("other", "dog", instance_prompt="my sks dog"))},
            "unique_token sks comes twice",
        ),
        (
            {"concepts_list": (DOG, Concept("other", instance_prompt="A photo of a  sks dog"))},
            "instance_prompt A photo of a sks dog comes twice",
        ),
        (
            {"concepts_list": (replace(DOG, class_data_dir="pets"), replace(CAT, class_data_dir="pets/"))},
            'class_data_dir pets/ comes with two class prompts, "a photo of a dog" and "a photo of a cat"',
        ),
        (
            {"concepts_list": tuple(Concept(name, instance_prompt="x") for name in "ab")},
            "instance_prompt x comes twice",
        ),
        (
            {"concepts_list": (DOG, Concept("cat", "cat", "Dog"))},
            "unique_token Dog is another subject's class_word",
        ),
        (
            {"concepts_list": (DOG, Concept("b", instance_prompt="x")), "with_prior_preservation": True},
            "--with_prior_preservation needs",
        ),
    ],
)
def test_subjects_that_cannot_be_told_apart_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainingConfig(**settings)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("dog", "a dog"),
        ("orange", "an orange"),
        ("Apple pie", "an Apple pie"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("one-eyed cat", "a one-eyed cat"),
        ("hourglass", "an hourglass"),
        ("sks owl", "a sks owl"),
    ],
)
def test_articles(noun, expected):
    assert with_article(noun) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_word": None}, "--class_word"),
        ({"instance_data_dir": ""}, "--instance_data_dir"),
        ({"instance_prompt": "  "}, "--instance_prompt"),
        ({"class_word": None, "instance_prompt": "x", "with_prior_preservation": True}, "--class_prompt"),
        ({"hub_model_id": "dog"}, "--hub_model_id would have no effect: it is for --push_to_hub"),
        ({"unmasked_weight": 1.5}, "--unmasked_weight"),
        ({"unmasked_weight": float("nan")}, "--unmasked_weight"),
        ({"learning_rate": float("nan")}, "--learning_rate"),
        ({"learning_rate": float("inf")}, "--learning_rate"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"max_train_steps": 0}, "--max_train_steps"),
        ({"train_batch_size": -1}, "--train_batch_size"),
        ({"adam_beta1": 1.0}, "--adam_beta1"),
        ({"snr_gamma": 0.0}, "--snr_gamma"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**63}, "--seed"),
        ({"optimizer": "prodigy"}, "--learning_rate 1"),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.1}, "--text_encoder_lr"),
        ({"text_encoder_lr": 1e-5, "adapter": AdapterConfig(nblocks=4, text_encoder=False)}, "--text_encoder_lr"),
        ({"text_encoder_lr": 0.0}, "--text_encoder_lr"),
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "--lr_scheduler constant"),
        ({"optimizer": "schedulefree", "adam_beta1": 0.0}, "--adam_beta1 0"),
        ({"lr_warmup_steps": 10}, "constant_with_warmup"),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 10, "max_train_steps": 10}, "--lr_warmup_steps 10"),
        ({"optimizer": "schedulefree", "lr_warmup_steps": 100, "max_train_steps": 10}, "--lr_warmup_steps 100"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, "--learning_rate 1e-07: --lr_scheduler polynomial"),
        ({"lr_scheduler": "cosine", "lr_num_cycles": 2}, "--lr_num_cycles would have no effect"),
        ({"lr_scheduler": "linear", "lr_power": 2.0}, "--lr_power would have no effect"),
        ({"prior_loss_weight": 0.5}, "--prior_loss_weight would have no effect"),
        ({"num_class_images": 5}, "--num_class_images would have no effect"),
        ({"class_data_dir": "dogs"}, "--class_data_dir would have no effect"),
        ({"class_prompt": "some dog"}, "--class_prompt would have no effect"),
        ({"accept_changes": True}, "--accept_changes would have no effect"),
        ({"keep": "best", "num_validation_images": 0}, "--keep would have no effect"),
        ({"keep": "best", "validation_steps": 0}, "--keep would have no effect"),
        ({"patience": 2}, "--patience would have no effect"),
        ({"prior_target": "base_prediction"}, "--prior_target would have no effect"),
        (
            {"with_prior_preservation": True, "prior_target": "base_prediction", "class_data_dir": "dogs"},
            "--class_data_dir would have no effect: --prior_target base_prediction uses no class images",
        ),
        ({"validation_data_dir": "others"}, "--validation_data_dir would have no effect"),
        ({"base_config": "folder"}, "--base_config would have no effect"),
        ({"pretrained_model_name_or_path": "a.safetensors", "variant": "fp16"}, "--variant would have no effect"),
        ({"pretrained_model_name_or_path": "a.safetensors", "revision": "x"}, "--revision would have no effect"),
        ({"hub_token": "secret"}, "--hub_token would have no effect: [^:]*$"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainingConfig(**({"instance_data_dir": "photos", "class_word": "dog"} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ("a",), "prompts_file": "b"}, "--prompts_file"),
        ({"adapter": ()}, "--adapter"),
        ({"adapter": ("a", "b", "a")}, "--adapter a: comes twice"),
        ({"adapter": ("a", "b"), "strength": (1.0,)}, "--strength: give one for each --adapter, 2 and not 1"),
        ({"adapter": ("a", "b"), "strength": (1.0, float("nan"))}, r"--strength 1\.0 nan"),
        ({"num_images": 0}, "--num_images"),
        ({"guidance_scale": float("nan")}, "--guidance_scale"),
        ({"guidance_scale": 1.0, "negative_prompt": "x"}, "--negative_prompt would have no effect"),
        ({"guidance_scale": 0.0, "negative_prompt": "x"}, "--negative_prompt would have no effect"),
        ({"width": 64, "height": 64, "resolution": 64}, "--resolution would have no effect"),
        ({"strength": (0.0,), "compare": True}, "--compare would have no effect"),
        ({"seed": 2**63}, "--seed"),
    ],
)
def test_generation_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**({"adapter": ("adapter",)} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": (0.0,)}, "--strength 0: would give the base"),
        ({"format": "checkpoint", "rank": 8}, "--rank would have no effect"),
    ],
)
def test_export_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ExportConfig(**({"adapter": ("adapter",), "format": "kohya_lora"} | settings))


def test_guidance_that_is_off_and_a_negative_prompt():
    with pytest.raises(UserError, match="--negative_prompt would have no effect"):
        SamplerConfig(guidance_scale=1.0, negative_prompt="x")
    assert SamplerConfig(negative_prompt="x").guidance_scale is None


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"max_train_steps": 3}, []),  # shorter than the defaults, which nobody asked for
        ({"max_train_steps": 3, "checkpointing_steps": 4}, ["--checkpointing_steps"]),
        ({"max_train_steps": 3, "checkpointing_steps": 3, "validation_steps": 3}, ["--validation_steps"]),
        ({"num_validation_images": 0}, []),
        ({"num_validation_images": 0, "validation_steps": 2}, ["--validation_steps"]),
        ({"num_validation_images": 0, "validation_prompts": ("a dog",)}, ["--validation_prompts"]),
        ({"num_validation_images": 0, "sample_batch_size": 2}, []),  # pick_checkpoint takes it
        ({"checkpointing_steps": 0, "checkpoints_total_limit": 2}, ["--checkpoints_total_limit"]),
        ({"keep": "best"}, []),
        ({"keep": "best", "max_train_steps": 250}, ["--keep"]),
        ({"dataloader_num_workers": 2}, ["--dataloader_num_workers"]),
        ({"dataloader_num_workers": 2, "cache_latents": False}, []),
        ({"with_prior_preservation": True, "prior_loss_weight": 0.0}, ["--with_prior_preservation"]),
    ],
    ids=str,
)
def test_what_has_no_effect_is_noted_if_it_was_asked_for(settings, names):
    config = TrainingConfig(**({"instance_data_dir": "photos", "class_word": "dog", "max_train_steps": 500} | settings))
    for each in (config.resolved(), TrainingConfig.from_dict(config.resolved().to_dict())):
        assert [note.split()[0] for note in each.notes()] == names


def test_class_images_in_a_list_of_subjects_are_noted():
    concepts = (Concept("a", "dog", class_data_dir="dogs"), Concept("b", "cat", "zwx"))
    config = TrainingConfig(concepts_list=concepts, max_train_steps=500).resolved()
    assert ["--concepts_list" in note for note in config.notes()] == [True]
    plain = TrainingConfig(concepts_list=concepts[1:], max_train_steps=500).resolved()
    assert plain.notes() == []


def test_resolving_twice_changes_nothing():
    config = TrainingConfig("photos", class_word="dog").resolved()
    assert replace(config, validation_prompts=None).resolved() == config
