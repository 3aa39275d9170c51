"""A run's `settings.yaml` with flags on top."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gsoft_diffusion.config import AdapterConfig, SamplerConfig, TrainingConfig
from gsoft_diffusion.config.command_line import parse
from gsoft_diffusion.foundation.errors import UserError

# As a run on the miniature base fills in what is left open.
DECIDED = {
    "resolution": 64,
    "max_train_steps": 600,
    "learning_rate": 2e-4,
    "text_encoder_lr": 4e-6,
    "adapter": AdapterConfig(nblocks=32),
    "sampler": SamplerConfig(guidance_scale=3.0, scheduler="DDIMScheduler"),
}


@pytest.fixture
def under(tmp_path):
    """A function by which flags come on top of the settings of a run with these prompts."""

    def parsed(*flags: str, **given: str) -> TrainingConfig:
        path = tmp_path / "settings.yaml"
        path.write_text(TrainingConfig("photos", **({"class_word": "dog"} | given), **DECIDED).resolved().to_yaml())
        return parse(TrainingConfig, "", ["--config", str(path), *flags]).resolved()

    return parsed


def test_prompts_follow_the_names_that_flags_give(under):
    config = under("--instance_data_dir", "cats", "--class_word", "cat")
    assert config == TrainingConfig("cats", "cat", output_dir="outputs/photos", **DECIDED).resolved()
    config = under("--class_word", "cat", "--with_prior_preservation", unique_token="zwx")
    assert (config.instance_prompt, config.class_prompt) == ("a photo of a zwx cat", "a photo of a cat")
    assert config.validation_prompts[1] == "a zwx cat on the beach"


def test_prompts_that_were_given_stay(under):
    config = under("--unique_token", "zwx", instance_prompt="a zwx dog, outside")
    assert (config.instance_prompt, config.unique_token) == ("a zwx dog, outside", "zwx")
    assert under("--seed", "1", instance_prompt="zwx").instance_prompt == "zwx"


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        (["--seed", "1"], 4e-6),
        (["--no_train_text_encoder"], None),
        (["--optimizer", "prodigy", "--learning_rate", "1"], None),
    ],
)
def test_the_rate_of_text_encoders_goes_where_flags_leave_it_without_effect(under, flags, rate):
    assert under(*flags).text_encoder_lr == rate


def test_what_flags_contradict_among_themselves_is_refused(under):
    with pytest.raises(UserError, match="--text_encoder_lr would have no effect"):
        under("--no_train_text_encoder", "--text_encoder_lr", "1e-6")


def test_another_base_model_has_a_line_for_what_the_first_decided(under, capfd):
    assert under("--pretrained_model_name_or_path", "someone/model", "--block_size", "64").resolution == 64
    names = ("resolution", "max_train_steps", "learning_rate", "text_encoder_lr", "guidance_scale", "scheduler")
    said = capfd.readouterr().out
    assert f"settings.yaml says {', '.join(names)}, for another base model; to have the new one decide, give" in said
    flags = said.partition("give ")[2].split()
    config = under("--pretrained_model_name_or_path", "someone/model", "--nblocks", "none", *flags)
    assert config == replace(TrainingConfig("photos", "dog").resolved(), pretrained_model_name_or_path="someone/model")
    under("--pretrained_model_name_or_path", "data/mini_base")
    assert capfd.readouterr().out == ""
