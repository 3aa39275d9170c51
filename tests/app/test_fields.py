"""Fields of the page are those of the command line."""

from __future__ import annotations

from dataclasses import MISSING

import pytest

from gsoft_diffusion.app.fields import fields_of, held_by, marks, settings_from
from gsoft_diffusion.app.steps import draw, train
from gsoft_diffusion.config import GenerationConfig, TrainingConfig
from gsoft_diffusion.config.settings import field_help
from gsoft_diffusion.foundation.errors import UserError

FIELDS = fields_of(TrainingConfig, train.ELSEWHERE)
NAMES = [each.name for each in FIELDS]


def named(name):
    return FIELDS[NAMES.index(name)]


def test_every_setting_is_there_or_asked_for_elsewhere():
    own = {name.partition(".")[0] for name in NAMES}
    assert own | set(train.ELSEWHERE) == set(field_help(TrainingConfig))
    assert not own & set(train.ELSEWHERE)
    assert {"adapter.nblocks", "sampler.guidance_scale"} <= set(NAMES)
    drawing = {each.name for each in fields_of(GenerationConfig, draw.ELSEWHERE)}
    assert drawing | set(draw.ELSEWHERE) == set(field_help(GenerationConfig))


def test_the_words_are_the_commands_own():
    for field in FIELDS:
        component = field.component()
        assert component.info.startswith(field_help(TrainingConfig).get(field.name, field.help))
    assert named("adapter.text_encoder").flag == "train_text_encoder"
    assert named("adapter.nfactors").info.endswith("(default: 2)")
    assert "By default 32" in named("adapter.nblocks").info


@pytest.mark.parametrize(
    ("name", "held", "value"),
    [
        ("max_train_steps", "", MISSING),
        ("max_train_steps", None, MISSING),
        ("max_train_steps", " 20 ", 20),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "none", None),
        ("random_flip", True, True),
        ("random_flip", False, MISSING),
        ("cache_latents", False, False),
        ("optimizer", "prodigy", "prodigy"),
        ("optimizer", "", MISSING),
        ("quantize_base", "nf4", "nf4"),
        ("adapter.nfactors", "dense", "dense"),
        ("adapter.nfactors", "3", 3),
        ("validation_prompts", "a dog\n\n a cat ", ["a dog", "a cat"]),
    ],
)
def test_values_are_read_as_the_command_line_reads_them(name, held, value):
    found = named(name).value(held)
    assert found == value
    assert type(found) is type(value)
    if value is not MISSING and value is not None:
        assert named(name).value(named(name).shown(value)) == value


def test_settings_go_to_fields_and_back():
    settings = {"max_train_steps": 7, "adapter": {"nblocks": 4}, "validation_prompts": ["a", "b"], "random_flip": True}
    held = held_by(FIELDS, settings)
    assert settings_from(FIELDS, held) == settings
    assert settings_from(FIELDS, held_by(FIELDS, {})) == {}


@pytest.mark.parametrize(
    ("message", "marked"),
    [
        ("--max_train_steps 0: must be more than 0", "max_train_steps"),
        ("--lr_warmup_steps 9: the run ends at step 5", "lr_warmup_steps"),
        ("--train_text_encoder: x", "adapter.text_encoder"),
        ("learning_rate: 'x' is not a number", "learning_rate"),
        ("--no_such_thing: x", None),
        ("photos/a.png: damaged", None),
    ],
)
def test_an_error_is_shown_beside_its_field(message, marked):
    updates, rest = marks(FIELDS, UserError(message))
    wrong = [field.name for field, update in zip(FIELDS, updates, strict=True) if update["elem_classes"]]
    assert wrong == ([marked] if marked else [])
    assert rest == ("" if marked else message)
    if marked:
        assert message in updates[NAMES.index(marked)]["info"]


def test_a_wrong_type_names_the_field():
    with pytest.raises(UserError, match="--max_train_steps many: is not a whole number or none"):
        named("max_train_steps").value("many")
