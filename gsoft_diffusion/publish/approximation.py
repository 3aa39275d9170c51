"""How near an export that holds changes of weights comes to the adapter's."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Approximation:
    """One layer's change of the weight in an export, and how near it comes to the adapter's `W' − W`.

    name: the layer's name in the adapter.
    weight_norm, change_norm, lost_norm: `‖W‖`, `‖W' − W‖` and `‖W' − W − exported‖`, Frobenius, rounding included.
    """

    name: str
    weight_norm: float
    change_norm: float
    lost_norm: float

    @property
    def change(self) -> float:
        """How much the adapter changes the layer, relative to the layer."""
        return _ratio(self.change_norm, self.weight_norm)

    @property
    def error(self) -> float:
        """How much of that change the export loses, relative to the change."""
        return _ratio(self.lost_norm, self.change_norm)


def total_error(layers: Sequence[Approximation]) -> float:
    """The error of all layers taken as one vector of weights."""
    return _ratio(
        math.hypot(*(layer.lost_norm for layer in layers)), math.hypot(*(layer.change_norm for layer in layers))
    )


def write_report(target: Path, layers: Sequence[Approximation]) -> None:
    """Write a table of the layers: name, `change` and `error`.

    target: the CSV file. layers: of the export.
    """
    with target.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["layer", "change", "error"])
        table.writerows([layer.name, f"{layer.change:.3e}", f"{layer.error:.3e}"] for layer in layers)


def _ratio(part: float, whole: float) -> float:
    """`part / whole`, and nothing of nothing is 0."""
    return part / whole if whole else 0.0
