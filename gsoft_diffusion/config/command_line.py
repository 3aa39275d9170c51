"""Command lines from the settings' dataclasses: one option for each field, with help from the class docstring."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from gsoft_diffusion.config import AppConfig, ExportConfig, GenerationConfig, TrainingConfig
from gsoft_diffusion.config.launcher import check_launched, launched_settings, process_count
from gsoft_diffusion.config.overrides import kept_from_another_base, left_to_flags
from gsoft_diffusion.config.settings import described, field_help, overlay, read_list, read_yaml
from gsoft_diffusion.foundation.bundled import CHECKOUT
from gsoft_diffusion.foundation.errors import UserError

RENAMED = {"text_encoder": "train_text_encoder"}  # a field whose name needs its group around it
OPPOSITES = {"double": ("--one_sided",)}  # further names for switching a boolean off, beside --no_<name>

# The scripts at the root of a checkout, by what an installation calls the same command.
SCRIPTS = {"gsoft-train": "train_dreambooth_gsoft.py", "gsoft-draw": "inference.py", "gsoft-export": "export.py"}

AnyConfig = TypeVar("AnyConfig", TrainingConfig, GenerationConfig, ExportConfig, AppConfig)


def parse(config_class: type[AnyConfig], description: str, arguments: Sequence[str] | None = None) -> AnyConfig:
    """The settings from the command line. With `--config FILE.yaml` they come from the file, and flags override them.

    config_class: the settings' dataclass, which decides the options.
    description: text above them in `--help`.
    arguments: the command line without the program's name; by default this process's.

    What a file of training settings derives from others in it follows the flags, see `overrides`; a line says what it
    keeps that was for another base model. A setting in neither takes the value of accelerate's launcher, if there is
    one. Raises UserError for a setting that is unknown, of a wrong type, not valid, or otherwise than the launcher's,
    and if several processes were launched for what runs in one. What argparse itself refuses ends the program with
    status 2.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings to start from; flags override them")
    add_flags(parser, config_class)
    flags = vars(parser.parse_args(arguments))
    path = flags.pop("config")
    values = read_yaml(path) if path else {}
    if path and flags and config_class is TrainingConfig:
        if kept := kept_from_another_base(values, flags):
            print(
                f"note: {path} says {', '.join(kept)}, for another base model; to have the new one decide, give "
                + " ".join(f"--{name} none" for name in kept)
            )
        values = left_to_flags(values, flags)
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flags.items():
        group, _, field = name.rpartition(".")
        (groups.setdefault(group, {}) if group else values)[field] = value
    for group, overrides in groups.items():
        values[group] = overlay(values.get(group, {}), overrides)
    required = [field.name for field in fields(config_class) if field.default is MISSING]
    if missing := [f"--{name}" for name in required if name not in values]:
        parser.error(f"give {' and '.join(missing)}")
    launched = launched_settings()
    names = {field.name for field in fields(config_class)} & launched.keys()
    config = config_class.from_dict({name: launched[name] for name in names} | values, path)
    check_launched(config.to_dict())
    if process_count() > 1 and config_class is not TrainingConfig:
        raise UserError(f"{parser.prog} runs in one process, and {process_count()} were launched; start it with python")
    return config


def add_flags(parser: argparse._ActionsContainer, config_class: Any, group: str = "") -> None:
    """Add an option for every field, nested ones included; an option that is not given is not in the namespace.

    parser: gets the options.
    config_class: the settings' dataclass, whose docstring has the help.
    group: what stands before the fields' names in the namespace: "" or, for a nested group, `<field>.`.
    """
    hints, help_texts = get_type_hints(config_class), field_help(config_class)
    for field in fields(config_class):
        hint, name = hints[field.name], RENAMED.get(field.name, field.name)
        if is_dataclass(hint):
            add_flags(parser.add_argument_group(help_texts[field.name]), hint, f"{field.name}.")
            continue
        text = help_texts[field.name].replace("%", "%%")
        if field.default not in (MISSING, None, (), ""):
            text += f" (default: {field.default})"
        common: dict[str, Any] = {"dest": group + field.name, "default": argparse.SUPPRESS}
        if hint is bool:
            opposites = (f"--no_{name}", f"--no-{name}", *OPPOSITES.get(field.name, ()))
            parser.add_argument(f"--{name}", *opposites, action=Switch, help=text, **common)
        elif get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
            parser.add_argument(f"--{name}", type=read_list, metavar="FILE", help=text, **common)
        elif several := [choice for choice in (hint, *get_args(hint)) if get_origin(choice) is tuple]:
            item = get_args(several[0])[0]
            names = dict.fromkeys((f"--{name}", f"--{name.removesuffix('s')}"))  # --prompts a b; --prompt a --prompt b
            common |= {"type": reader(item), "metavar": "TEXT" if item is str else "NUMBER"}
            parser.add_argument(*names, action="extend", nargs="+", help=text, **common)
        else:
            choices = get_args(hint) if get_origin(hint) is Literal else None
            metavar = None if choices else name.rpartition("_")[2].upper()
            parser.add_argument(f"--{name}", type=reader(hint), choices=choices, metavar=metavar, help=text, **common)


class Switch(argparse.Action):
    """An option that takes no value: its first name switches on, the others off."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def reader(hint: Any) -> Callable[[str], Any]:
    """The parser of an option's text into its field's type; it takes `none` if the field may be None.

    hint: the field's annotation. The parser raises argparse.ArgumentTypeError for a text that is no such value.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)

    def read(text: str) -> Any:
        if type(None) in options and text.lower() == "none":
            return None
        for option in options:
            if option in (int, float):
                try:
                    return option(text)
                except ValueError:
                    continue
        if str in options or any(text in get_args(option) for option in options):
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not {described(hint)}")

    return read


def command(name: str) -> str:
    """How a console script, such as gsoft-train, is called from the working directory: its name, once installed.

    In a checkout it is the script at its root, with python before it and quoted for a shell.
    """
    if CHECKOUT is None:
        return name
    path = CHECKOUT / SCRIPTS[name]
    return f"python {shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))}"


def expanded_path(text: str) -> Path:
    """The type of an option that is a path: `~` stands for the home folder, which shells leave alone in `--out=~/x`."""
    return Path(text).expanduser()


def run(main: Callable[[], int]) -> NoReturn:
    """Leave the program with main's exit status; a UserError becomes one line on stderr and status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # Leaving this block frees the error's frames, and with them the process group, whose destructor would
            # wait for a peer that may never come.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)
