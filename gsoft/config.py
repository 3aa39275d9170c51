"""What is adapted and how: frozen dataclasses that check themselves and go through JSON unchanged."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from gsoft.errors import ConfigError

ALL_LINEAR = "all-linear"
Parametrization = Literal["scaled_cayley", "scaled_exp", "cayley", "exp"]


@dataclass(frozen=True)
class RotationConfig:
    """What is learned for one layer: the settings that decide its shapes.

    nblocks: number of diagonal blocks `r` of every GS factor; give this or `block_size`, not both.
    block_size: side `b` of every block, `r·b = width`.
    nfactors: block-diagonal factors in each `Q`; "dense" takes the fewest without zeros in `Q` (paper, Theorem 2).
    double: True for `W' = s·Q_out W Q_in` (§6.2), False for `W' = s·W Q_in` (§6.1).
    parametrization: map from skew-symmetric to orthogonal blocks, "cayley" or "exp"; with "scaled_" before it the
      learned numbers are scaled, so that one learning rate fits blocks of every size (see `gsoft.blocks.skew_factor`).
    output_scale: learn one factor per output feature, 1 at the start.

    Raises ConfigError for values that cannot be.
    """

    nblocks: int | None = None
    block_size: int | None = None
    nfactors: int | Literal["dense"] = 2
    double: bool = True
    parametrization: Parametrization = "scaled_cayley"
    output_scale: bool = True

    def __post_init__(self) -> None:
        self.check_size()
        for name, least, rule in (
            ("nblocks", 1, "1 or more"),
            ("block_size", 2, "2 or more (a block of side 1 cannot rotate)"),
        ):
            value = getattr(self, name)
            if value is not None and not _is_count(value, least):
                raise ConfigError((name,), f" {value}: must be {rule}")
        if self.nfactors != "dense" and not _is_count(self.nfactors, 1):
            raise ConfigError(("nfactors",), f' {self.nfactors}: must be 1 or more, or "dense"')
        if self.parametrization not in get_args(Parametrization):
            known = ", ".join(get_args(Parametrization))
            raise ConfigError(("parametrization",), f" {self.parametrization}: must be one of {known}")
        for name in ("double", "output_scale"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError((name,), f" {getattr(self, name)}: must be True or False")

    def check_size(self) -> None:
        """Raise ConfigError unless exactly one of `nblocks` and `block_size` is given."""
        if (self.nblocks is None) == (self.block_size is None):
            raise ConfigError(
                ("nblocks", "block_size"), ": give exactly one of them; the layer's width decides the other"
            )


@dataclass(frozen=True)
class Config(RotationConfig):
    """Which layers of a model are adapted, and what is learned for each (see `RotationConfig`).

    target_modules: the linear layers to adapt, as in PEFT: names, of which each stands for every layer that is called
      so or whose path ends in it (`("q_proj", "mlp.fc1")`); or one regular expression for whole paths; or "all-linear".
    exclude_modules: layers to leave out of those, as names or as one regular expression.
    modules_to_save: names of modules that are trained as a whole, such as a new head, and kept in the adapter's file.

    Raises ConfigError for values that cannot be.
    """

    target_modules: str | Collection[str] = ALL_LINEAR
    exclude_modules: str | Collection[str] = ()
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is None and name != "target_modules":  # PEFT's default
                value = ()
                object.__setattr__(self, name, value)
            if isinstance(value, str) and value.lower() == ALL_LINEAR:
                object.__setattr__(self, name, ALL_LINEAR)  # PEFT takes it in any case
            if isinstance(value, list | set | frozenset):
                value = tuple(value if isinstance(value, list) else sorted(value))
                object.__setattr__(self, name, value)  # so that equal configurations are equal
            if isinstance(value, str) and name != "modules_to_save":
                _check_pattern(name, value)
            elif not (isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)):
                also = "" if name == "modules_to_save" else ", or one regular expression"
                raise ConfigError((name,), f" {value!r}: must be a list of names{also}")
        if not self.target_modules:
            raise ConfigError(("target_modules",), f': name the layers to adapt, or give "{ALL_LINEAR}"')

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values, as `to_dict` gives them. ConfigError for unknown names and wrong values."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError((str(name),), f": unknown setting; known: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps: `from_dict(config.to_dict()) == config`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError((name,), f" {pattern!r}: not a regular expression ({error})") from error
