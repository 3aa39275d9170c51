from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from gsoft_diffusion.config import SamplerConfig, TrainingConfig
from gsoft_diffusion.config.settings import (
    POSITIVE,
    Mark,
    OnlyWith,
    Settings,
    check_rules,
    field_help,
    marked,
    read_yaml,
    refuse_without_effect,
    without_effect,
)
from gsoft_diffusion.foundation.errors import UserError


@dataclass(frozen=True)
class Inner(Settings):
    """A group.

    size: how large.
    name: what it
        is called.
    """

    size: int = 3
    name: str = "inner"


@dataclass(frozen=True)
class Outer(Settings):
    """All kinds of fields."""

    rate: float
    count: int | None = None
    kind: Literal["a", "b"] = "a"
    words: tuple[str, ...] | None = None
    on: bool = False
    inner: Inner = Inner()


def test_round_trip_through_plain_values():
    settings = Outer(rate=1e-4, count=2, kind="b", words=("x", "y z"), on=True, inner=Inner(size=5))
    assert Outer.from_dict(settings.to_dict()) == settings
    assert settings.to_dict()["words"] == ["x", "y z"]


def test_round_trip_through_yaml(tmp_path):
    settings = Outer(rate=1e-7, words=("no", "1e-4", "ünï", "yes: no"), inner=Inner(name="null"))
    path = tmp_path / "settings.yaml"
    path.write_text(settings.to_yaml(), encoding="utf-8")
    assert Outer.from_dict(read_yaml(path)) == settings


def test_yaml_means_what_people_mean(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("rate: 1e-4\nlong_rate: 2.5E+3\nprecision: no\nflag: True\noff: false\nempty:\n")
    assert read_yaml(path) == {
        "rate": 1e-4,
        "long_rate": 2500.0,
        "precision": "no",
        "flag": True,
        "off": False,
        "empty": None,
    }


@pytest.mark.parametrize(
    "text", ["- a list", "just text", "a: [1", "", "a: 1\na: 2", "a: {b: 1, b: 1}", "a: !!python/object:os.system {}"]
)
def test_broken_yaml_names_the_file(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_group_of_settings_must_be_one():
    with pytest.raises(UserError, match="SamplerConfig: expected settings as `name: value`, got 3"):
        SamplerConfig.from_dict(3)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["settings.yaml", "settings.json", "settings.JSON"])
def test_settings_as_editors_save_them(tmp_path, encoding, name):
    path = tmp_path / name
    path.write_text('{"words": "größer",\n"rate": 2}\n', encoding=encoding, newline="\r\n")
    assert read_yaml(path) == {"words": "größer", "rate": 2}


def test_missing_yaml_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "rate"),
        ({"rate": "fast"}, "rate"),
        ({"rate": True}, "rate"),
        ({"rate": None}, "rate"),
        ({"rate": 1, "count": 1.5}, "count"),
        ({"rate": 1, "count": True}, "count"),
        ({"rate": 1, "kind": "c"}, "kind"),
        ({"rate": 10**400}, "rate"),
        ({"rate": 1, "words": "one"}, "words"),
        ({"rate": 1, "words": [1]}, "words"),
        ({"rate": 1, "on": 1}, "on"),
        ({"rate": 1, "inner": 3}, "inner"),
        ({"rate": 1, "inner": {"size": "x"}}, "size"),
        ({"rate": 1, "inner": {"sise": 4}}, "sise"),
        ({"rate": 1, 5: 5}, "5"),
    ],
)
def test_wrong_values_are_refused_by_name(values, name):
    with pytest.raises(UserError, match=name):
        Outer.from_dict(values)


def test_a_list_of_groups_is_called_that():
    with pytest.raises(UserError, match=r"^concepts_list: 'subjects\.json' is not a list of settings of Concept$"):
        TrainingConfig.from_dict({"concepts_list": "subjects.json"})


def test_whole_numbers_beyond_all_others_are_refused_in_a_line():
    with pytest.raises(UserError, match=r"^--seed 1000.*: must be less than 2⁶³$"):
        TrainingConfig("photos", class_word="dog", seed=10**400)


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(UserError, match=r"unknown setting cuont; known: count$"):
        Outer.from_dict({"rate": 1, "cuont": 2})


def test_whole_numbers_become_floats():
    rate = Outer.from_dict({"rate": 2}).rate
    assert isinstance(rate, float)


def test_a_group_given_in_part_keeps_its_other_defaults():
    assert Outer.from_dict({"rate": 1, "inner": {"size": 9}}).inner == Inner(size=9, name="inner")


def test_help_comes_from_the_docstring():
    assert field_help(Inner) == {"size": "how large.", "name": "what it is called."}


RULE = OnlyWith(("count", "on"), lambda settings: settings.kind == "b", "it is for kind b; leave it out")


def test_what_was_given_and_has_no_effect_is_found():
    assert list(without_effect(Outer(1.0, count=2, on=True), [RULE])) == [
        "--count would have no effect: it is for kind b; leave it out",
        "--on would have no effect: it is for kind b; leave it out",
    ]
    assert list(without_effect(Outer(1.0), [RULE])) == []
    assert list(without_effect(Outer(1.0, count=2, kind="b"), [RULE])) == []
    with pytest.raises(UserError, match="--count would have no effect"):
        refuse_without_effect(Outer(1.0, count=2), [RULE])


def test_files_of_settings_are_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text("seed: 3")
    assert read_yaml("~/settings.yaml") == {"seed": 3}


def test_rules_and_marks_stand_with_the_fields():
    @dataclass(frozen=True)
    class Some(Settings):
        """a: one. b: another."""

        a: Annotated[int | None, POSITIVE] = None
        b: Annotated[str, Mark.PATH, Mark.PRIVATE] = ""

    assert (marked(Some, Mark.PATH), marked(Some, Mark.FREE_TO_CHANGE)) == (["b"], [])
    check_rules(Some())
    check_rules(Some(a=1))
    with pytest.raises(UserError, match=r"^--a 0: must be more than 0$"):
        check_rules(Some(a=0))
