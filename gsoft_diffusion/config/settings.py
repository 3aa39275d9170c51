"""What all settings have in common: strict conversion from and to plain JSON and YAML values."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin, get_type_hints

import yaml

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.text_files import on_disk, read_text


def positive(value: float) -> bool:
    """Whether the value is finite and more than 0."""
    return 0 < value < math.inf


def not_negative(value: float) -> bool:
    """Whether the value is finite and at least 0."""
    return 0 <= value < math.inf


class Rule(NamedTuple):
    """What a setting's value must be, unless it is None: it stands in the field's annotation."""

    test: Callable[[Any], bool]
    text: str  # "must be" goes before it


POSITIVE = Rule(positive, "more than 0")
NOT_NEGATIVE = Rule(not_negative, "0 or more")
BELOW_2_TO_32 = Rule(lambda seed: seed < 2**32, "less than 2³²")
BELOW_2_TO_63 = Rule(lambda seed: seed < 2**63, "less than 2⁶³")


class Mark(Enum):
    """What else is said of a setting in the field's annotation."""

    PATH = "a folder or a file, or in some cases a name on the hub: `~` stands for the home folder"
    PRIVATE = "not in adapters, which are shared: it says more of the user's disk than of the result"
    FREE_TO_CHANGE = "may change when a run is resumed: it decides how long, or what is reported, not how it learns"


class Settings:
    """Base of the frozen dataclasses in this package.

    Each documents its fields once, in its docstring, as lines `name: text`, where `field_help` finds them for the
    command line.
    """

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: object = None) -> Self:
        """Build from plain values.

        values: by the fields' names. A group of settings (a field that is a dataclass itself) may be given in part; the
        rest has the field's default.
        source: the file or option that they are from, for messages; by default the class is named.

        Raises UserError for names that are unknown or missing, wrong types, and values that the class refuses.
        """
        source = source or cls.__name__
        hints = get_type_hints(cls)
        defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
        names = list(defaults)
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: expected settings as `name: value`, got {values!r}")
        for name in values:
            if name not in names:
                known = difflib.get_close_matches(str(name), names, n=1) or names
                raise UserError(f"{source}: unknown setting {name}; known: {', '.join(known)}")
        if missing := [name for name in names if defaults[name] is MISSING and name not in values]:
            raise UserError(f"{source}: {', '.join(missing)} must be given")
        values = {
            name: overlay(defaults[name].to_dict(), value) if _is_group(hints[name]) else value
            for name, value in values.items()
        }
        return cls(**{name: _typed(value, hints[name], name) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML keep: `from_dict(x.to_dict()) == x`."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    def to_yaml(self) -> str:
        """The settings as YAML, in the order of the fields, as `read_yaml` and `from_dict` read them."""
        return yaml.dump(self.to_dict(), Dumper=_YamlDumper, sort_keys=False, allow_unicode=True)


@cache
def said_of(cls: Any) -> dict[str, tuple[Any, ...]]:
    """The rules and marks of each field."""
    hints = get_type_hints(cls, include_extras=True)
    found = {field.name: hints[field.name] for field in fields(cls)}
    return {name: get_args(hint)[1:] if get_origin(hint) is Annotated else () for name, hint in found.items()}


def marked(cls: Any, mark: Mark) -> list[str]:
    """The names of the fields with this mark."""
    return [name for name, said in said_of(cls).items() if mark in said]


def overlay(group: Any, values: Any) -> Any:
    """A group's settings with some of them replaced; nblocks and block_size exclude each other.

    group: settings by name. values: those that replace. If either is no mapping, `values` is returned as it is.
    """
    if not (isinstance(group, Mapping) and isinstance(values, Mapping)):
        return values
    sizes = {"nblocks", "block_size"}
    kept = {name: value for name, value in group.items() if not (name in sizes and sizes & values.keys())}
    return kept | dict(values)


def field_help(cls: type) -> dict[str, str]:
    """What the class docstring says about each field, in lines `name: text`."""
    lines = re.findall(r"^    (\w+): (.*(?:\n {6,}\S.*)*)", cls.__doc__ or "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in lines}


class _YamlLoader(yaml.SafeLoader):
    """Reads `1e-4` as a number and `no` as a text, which people mean and YAML 1.1 does not; no name may come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _named_once([(self.construct_object(name, deep=True), None) for name, _ in node.value])
        return super().construct_mapping(node, deep=deep)


def _named_once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} comes twice")
    return dict(pairs)


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$", re.IGNORECASE), list("tTfF"))


class _YamlDumper(yaml.SafeDumper):
    """Puts quotes around texts that `_YamlLoader` or another reader would take for something else."""


for _class in (_YamlLoader, _YamlDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises UserError if it cannot be read or is not a mapping."""
    values = _read(Path(path).expanduser())
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of `name: value`")
    return values


def read_list(path: str | Path) -> list[Any]:
    """The list in a JSON or YAML file. Raises UserError if it cannot be read or is something else."""
    values = _read(Path(path).expanduser())
    if not (isinstance(values, list) and values):
        raise UserError(f"{path}: expected a list")
    return values


def _read(path: Path) -> Any:
    text = read_text(path)
    try:
        return (
            json.loads(text, object_pairs_hook=_named_once)
            if path.suffix.lower() == ".json"
            else yaml.load(text, Loader=_YamlLoader)
        )
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the settings in {path}: {' '.join(str(error).split())}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_dict() if isinstance(value, Settings) else value


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Settings)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotation `hint` wants it: lists become tuples, whole numbers floats; else UserError."""
    if get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            try:
                return _typed(value, option, name)
            except UserError:
                continue
    elif get_origin(hint) is Literal:
        if value in get_args(hint) and not isinstance(value, bool):
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            item_hint = get_args(hint)[0]
            with nullcontext() if _is_group(item_hint) else suppress(UserError):  # a group says best what is wrong
                return tuple(_typed(item, item_hint, name) for item in value)
    elif _is_group(hint):
        if isinstance(value, hint | Mapping):
            return value if isinstance(value, hint) else hint.from_dict(value, name)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):  # of whole numbers beyond all floats
                return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{name}: {value!r} is not {described(hint)}")


def described(hint: Any) -> str:
    """An annotation in words, for error messages."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(described(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        item = described(get_args(hint)[0])
        return "a list of " + (item if _is_group(get_args(hint)[0]) else item.partition(" ")[2] + "s")
    if hint is type(None):
        return "none"
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}.get(
        hint.__name__, f"settings of {hint.__name__}"
    )


def require(settings: Any, test: Callable[[Any], bool], rule: str, *names: str) -> None:
    """Raise UserError for the first of the named fields that is set and fails the test.

    settings: whose fields are looked at.
    test: says of a value whether it will do; None is not tested.
    rule: the message's words after "must be".
    names: the fields, in the order in which they are tested.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not test(value):
            raise UserError(f"--{name} {value}: must be {rule}")


def check_rules(settings: Any) -> None:
    """Raise UserError for the first field that is set and does not obey its annotation's rules."""
    kind: Any = type(settings)
    for name, said in said_of(kind).items():
        for rule in said:
            if isinstance(rule, Rule):
                require(settings, *rule, name)


def settle_paths(settings: Any) -> None:
    """Let the paths among settings in the making, and tuples of paths, have the home folder for `~`.

    Names are spelt as they are on disk, where that is in another Unicode normal form.

    A shell expands `~` only where a word begins: not in `--output_dir=~/out`, and nobody does in a file of settings.
    """
    for name in marked(type(settings), Mark.PATH):
        value = getattr(settings, name)
        if isinstance(value, tuple):
            settled: Any = tuple(_settled(path, name) for path in value)
        else:
            settled = _settled(value, name) if value else value
        object.__setattr__(settings, name, settled)  # they are frozen from then on


def _settled(text: str, name: str) -> str:
    path = os.path.expanduser(text)  # noqa: PTH111 - it leaves `~nobody` as it is
    if path.startswith("~"):
        raise UserError(
            f"--{name} {text}: there is no user {text.split('/')[0]}; for a folder of that name give ./{text}"
        )
    found = on_disk(Path(path))
    return path if found == Path(path) else str(found)


@dataclass(frozen=True)
class OnlyWith:
    """A rule: the named settings have an effect only where the settings as a whole pass the test.

    why: the rest of the sentence "--name would have no effect: …", with what to do about it.
    """

    names: tuple[str, ...]
    test: Callable[[Any], Any]
    why: str


def without_effect(settings: Any, rules: Iterable[OnlyWith]) -> Iterator[str]:
    """A line for each setting that does nothing by the rules. What has its default was not asked for, and is left out.

    settings: a dataclass's instance. rules: when its fields have an effect.

    No values are named: one of the settings is a token.
    """
    defaults = {field.name: field.default for field in fields(settings)}
    for rule in rules:
        if not rule.test(settings):
            given = [name for name in rule.names if getattr(settings, name) != defaults[name]]
            yield from (f"--{name} would have no effect: {rule.why}" for name in given)


def refuse_without_effect(settings: Any, rules: Iterable[OnlyWith]) -> None:
    """Raise UserError for the first setting that does nothing by the rules.

    settings, rules: as in `without_effect`.
    """
    for line in without_effect(settings, rules):
        raise UserError(line)
