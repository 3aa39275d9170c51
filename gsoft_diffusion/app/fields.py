"""Fields of the page from the settings' own descriptions: name, help, kind and default are those of the flag."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gradio as gr

from gsoft_diffusion.config.command_line import RENAMED, reader
from gsoft_diffusion.config.settings import described, field_help
from gsoft_diffusion.foundation.errors import UserError

UNSET = ""  # in a choice: leave it to the default


@dataclass(frozen=True)
class Field:
    """A setting on the page.

    name: of the setting, with its group before it: adapter.nblocks. flag: as the command line calls it, without dashes.
    hint: the annotation of its type. help: its description. default: None if it is left open, MISSING if it must be
    given.
    """

    name: str
    flag: str
    hint: Any
    help: str
    default: Any

    @property
    def label(self) -> str:
        """The flag as people read it: Max train steps."""
        return self.flag.replace("_", " ").capitalize()

    @property
    def info(self) -> str:
        """The description with the default."""
        known = self.default not in (MISSING, None, (), "", True, False)
        return self.help + (f" (default: {self.default})" if known else "")

    @property
    def several(self) -> bool:
        """Whether it takes several texts, one a line."""
        return any(get_origin(each) is tuple for each in (self.hint, *get_args(self.hint)))

    @property
    def choices(self) -> list[str]:
        """What there is to choose from; nothing if it takes any text or number."""
        options = [self.hint, *get_args(self.hint)]
        named = next((get_args(each) for each in options if get_origin(each) is Literal), ())
        others = [each for each in options if each in (int, float, str)]
        return [] if others else list(map(str, named))

    def component(self) -> Any:
        """The field, empty where the default holds."""
        common: dict[str, Any] = {"label": self.label, "info": self.info, "elem_id": f"field-{self.flag}"}
        if self.hint is bool:
            return gr.Checkbox(value=bool(self.default), **common)
        if self.choices:
            return gr.Dropdown([("by default", UNSET), *self.choices], value=UNSET, **common)
        if self.several:
            return gr.Textbox(lines=4, placeholder="one a line", **common)
        return gr.Textbox(placeholder="by default", **common)

    def value(self, given: Any) -> Any:
        """The setting's value, MISSING where the field leaves it to the default. Raises UserError for a wrong type."""
        if self.hint is bool:
            return MISSING if given is None or bool(given) == bool(self.default) else bool(given)
        text = str(given if given is not None else "").strip()
        if not text:
            return MISSING
        if self.several:
            return [line.strip() for line in text.splitlines() if line.strip()]
        try:
            return reader(self.hint)(text)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise UserError(f"--{self.flag} {text}: is not {described(self.hint)}") from error

    def shown(self, value: Any) -> Any:
        """What the field holds for a setting's value; MISSING is the default."""
        if self.hint is bool:
            return bool(self.default if value is MISSING else value)
        if value is MISSING or value is None:
            return UNSET
        return "\n".join(map(str, value)) if self.several else str(value)

    def marked(self, message: str = "") -> Any:
        """An update that says beside the field what is wrong with it; "" if nothing is."""
        return gr.update(info=f"⚠ {message}" if message else self.info, elem_classes=["wrong"] if message else [])


def fields_of(config_class: Any, leave_out: Collection[str], group: str = "", defaults: Any = None) -> list[Field]:
    """The settings of a class, those of its groups included.

    config_class: the settings' dataclass. leave_out: names of settings that the page asks for otherwise.
    group, defaults: of a nested group, `<field>.` and its default.
    """
    hints, help_texts = get_type_hints(config_class), field_help(config_class)
    found: list[Field] = []
    for field in fields(config_class):
        hint, name = hints[field.name], group + field.name
        if name in leave_out:
            continue
        if is_dataclass(hint):
            found += fields_of(hint, leave_out, f"{field.name}.", field.default)
            continue
        default = getattr(defaults, field.name) if defaults else field.default
        found.append(Field(name, RENAMED.get(field.name, field.name), hint, help_texts[field.name], default))
    return found


def settings_from(some: Sequence[Field], given: Sequence[Any]) -> dict[str, Any]:
    """Settings by name, those of groups within the group's, from what fields hold; defaults are left out.

    some: the fields. given: what they hold, in their order. Raises UserError that names the flag.
    """
    settings: dict[str, Any] = {}
    for field, held in zip(some, given, strict=True):
        value = field.value(held)
        if value is not MISSING:
            group, _, name = field.name.rpartition(".")
            (settings.setdefault(group, {}) if group else settings)[name] = value
    return settings


def held_by(some: Sequence[Field], settings: Mapping[str, Any]) -> list[Any]:
    """What the fields hold for settings, as `settings_from` gave them."""
    held = []
    for field in some:
        group, _, name = field.name.rpartition(".")
        values = settings.get(group, {}) if group else settings
        held.append(field.shown(values.get(name, MISSING) if isinstance(values, Mapping) else MISSING))
    return held


def marks(some: Sequence[Field], error: UserError | None) -> tuple[list[Any], str]:
    """Updates that show an error beside the field that it names, and the error if it names none of them.

    some: the fields. error: None takes earlier marks away.
    """
    message = str(error) if error else ""
    flags = re.findall(r"--(?:no_)?(\w+)", message) + re.findall(r"^(?:\S+\.)?(\w+):", message)
    named = next((field for flag in flags for field in some if flag in (field.flag, field.name)), None)
    return [field.marked(message if field is named else "") for field in some], "" if named else message
