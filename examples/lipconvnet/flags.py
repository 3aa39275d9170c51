"""Flags that both programs have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from examples.lipconvnet.pictures import Pictures, cifar_pictures, world_pictures
from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.config.settings import OnlyWith
from gsoft_diffusion.foundation.errors import UserError

ONLY_WITH = (
    OnlyWith(
        ("training", "held_out"), lambda args: args.data == "world", "CIFAR-100 has its own numbers; leave it out"
    ),
    OnlyWith(("attack_steps",), lambda args: args.attacked, "--attacked 0 attacks nothing; leave out one of them"),
    OnlyWith(
        ("not_paired",),
        lambda args: args.groups is not None,
        "--groups soc shuffles no channels; leave out one of them",
    ),
)


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is shown: `read_pictures` reads them."""
    parser.add_argument("--data", choices=("world", "cifar100"), default="world", help="which pictures")
    parser.add_argument(
        "--folder",
        type=expanded_path,
        required=True,
        help="where npm installed the world's things, or CIFAR-100 is or comes",
    )
    parser.add_argument("--training", type=at_least(1), default=20_000, help="scenes of the world to train on")
    parser.add_argument("--held_out", type=at_least(1), default=2_000, help="scenes of each other part")


def add_training_flags(parser: argparse.ArgumentParser, epochs: int) -> None:
    """The flags that say how a network is trained."""
    parser.add_argument("--depth", type=at_least(5), default=5, help="convolutions without the last, a multiple of 5")
    parser.add_argument("--width", type=at_least(1), default=16, help="channels of the first stage")
    parser.add_argument("--epochs", type=at_least(1), default=epochs)
    parser.add_argument("--batch_size", type=at_least(1), default=128)
    parser.add_argument("--learning_rate", type=positive, default=0.1, help="at first; a tenth after 1/2 and 3/4")
    parser.add_argument("--attacked", type=at_least(0), default=500, help="test pictures to attack")
    parser.add_argument("--attack_steps", type=at_least(1), default=50, help="of projected gradient descent")


def refuse_without_effect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise UserError for the first flag that does nothing beside the others. What has its default was not asked for.

    args: what the flags say. parser: knows the defaults.
    """
    for rule in ONLY_WITH:
        for name in rule.names:
            if getattr(args, name, None) != parser.get_default(name) and not rule.test(args):
                raise UserError(f"--{name} would have no effect: {rule.why}")


def read_pictures(args: argparse.Namespace, seed: int) -> Pictures:
    """The pictures that the flags name, dealt out by the seed. Raises UserError if there are none, or too few."""
    if args.data == "cifar100":
        pictures = cifar_pictures(args.folder, seed)
    else:
        pictures = world_pictures(args.folder, seed, args.training, args.held_out)
    if len(pictures.training) < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size} is more than the {len(pictures.training)} training pictures")
    return pictures


def groups(text: str) -> tuple[int, int | None] | None:
    """The type of an option that is `soc`, `a,-` or `a,b`."""
    if text.lower() == "soc":
        return None
    first, _, second = text.partition(",")
    try:
        return int(first), None if second.strip() in ("-", "–", "−") else int(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not soc, a,- or a,b with numbers a and b") from None


def positive(text: str) -> float:
    """The type of an option that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, this one or more."""

    def whole(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return number

    whole.__name__ = "int"
    return whole
