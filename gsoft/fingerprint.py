"""Which base model an adapter belongs to: recognised by shapes and by a sketch of the weights, in any dtype."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsoft.errors import FileError, one_line

SKETCH_SIZE = 16
SKETCH_TOLERANCE = 0.01
OTHER_ARCHITECTURE = "another architecture"
log = logging.getLogger("gsoft")


@dataclass(frozen=True)
class BaseModelIdentity:
    """The model an adapter belongs to: a name for people, and a fingerprint (see `fingerprint`) that is compared."""

    name: str
    fingerprint: str


def fingerprint(architecture: Any, weights: Sequence[Tensor]) -> str:
    """`<architecture>:<sketch>`: recognises a base model whichever dtype it is loaded in.

    architecture: JSON value, of which a hash is compared exactly.
    weights: matrices, from which sixteen numbers of size 1 are made (see `_sketch`), unrelated for unrelated weights,
    while rounding to half precision moves them by about 0.001; compared within 0.01. Models whose weights differ by
    less than about half a percent pass as the same. Without weights there is no sketch.
    """
    digest = hashlib.sha256(json.dumps(architecture).encode()).hexdigest()[:16]
    sketch = []
    for place in range(SKETCH_SIZE if weights else 0):
        wave, first = divmod(place, len(weights))  # fewer weights than numbers have several each
        group = weights[first::SKETCH_SIZE]
        sketch.append(sum(_sketch(weight, wave) for weight in group) / math.sqrt(len(group)))
    return ":".join([digest, *(f"{number:+.4f}" for number in sketch)])


@torch.no_grad()
def _sketch(weight: Tensor, wave: int = 0) -> float:
    """`uᵀWv / ‖W‖` with fixed wave-like `u` and `v`: over unrelated weights, about a standard normal number.

    wave: which of several `u` and `v`, unrelated to each other.
    """
    u, v = (  # made on the CPU, so that they are the same on every device
        ((torch.arange(1, side + 1, device="cpu").float() * (1 + wave)).cos() * math.sqrt(2)).to(weight.device)
        for side in weight.shape
    )
    weight = weight.detach().float()
    return ((u[None] @ weight)[0] @ v / weight.norm().clamp(min=1e-12)).item()


def is_fingerprint(text: str) -> bool:
    """Whether a text has the form that `fingerprint` gives."""
    return re.fullmatch(r"[0-9a-f]{16}(:[+-]\d{1,4}\.\d{4})*", text) is not None


def difference(expected: str, given: str) -> str | None:
    """What two fingerprints disagree in, in words that follow "has", or None if they are of one model.

    expected, given: as `fingerprint` makes them; the order does not matter. Sketches are compared within 0.01, as far
    as both go: earlier files have fewer numbers for models of few layers, and a model on the meta device has none.
    """
    (expected_digest, *expected_sketch), (given_digest, *given_sketch) = expected.split(":"), given.split(":")
    if expected_digest != given_digest:
        return OTHER_ARCHITECTURE
    distances = [abs(float(a) - float(b)) for a, b in zip(expected_sketch, given_sketch, strict=False)]
    return "other weights" if max(distances, default=0.0) > SKETCH_TOLERANCE else None


def distance(one: str, other: str) -> float:
    """About how far the weights of two models of one architecture are apart: 0 for the same, 1.4 for unrelated ones.

    one, other: as `fingerprint` makes them.

    An estimate of the root mean square of `‖A/‖A‖ − B/‖B‖‖` over their matrices A and B, of which each number of the
    sketches differs by about a normal number of that size: sixteen of them tell it to about a fifth.
    """
    pairs = zip(one.split(":")[1:], other.split(":")[1:], strict=False)
    squares = [(float(a) - float(b)) ** 2 for a, b in pairs]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def how_far(one: str, other: str) -> str:
    """`distance` in words, such as "about 12% away (unrelated ones: 140%)"."""
    return f"about {100 * distance(one, other):.2g}% away (unrelated ones: 140%)"


def check_base(
    path: Path, trained: BaseModelIdentity, given: BaseModelIdentity, accept_other_base: bool, permission: str
) -> None:
    """Raise FileError unless an adapter belongs to a model, or to one of other weights where that is accepted.

    path: the adapter's file. trained: the model it was trained on. given: the model that it is to act on.
    accept_other_base: whether other weights in the same architecture will do: they are a warning of the logger `gsoft`.
    permission: how the caller is told to accept them, for the message.
    """
    found = difference(trained.fingerprint, given.fingerprint)
    if found is None:
        return
    words = f"{path}: trained on the base model {trained.name}, but the model given, {given.name}, has {found}"
    if found == OTHER_ARCHITECTURE:
        raise FileError(words)
    words += f", {how_far(trained.fingerprint, given.fingerprint)}"
    if not accept_other_base:
        raise FileError(f"{words}; {permission} takes it all the same")
    log.warning("%s", one_line(f"{words}; it is used all the same"))


def name_of(model: nn.Module) -> str:
    """What people call the model: its name on the hub or its folder, as far as it knows it, else its class."""
    config = getattr(model, "config", None)
    return one_line(str(getattr(config, "_name_or_path", "") or type(model).__name__))
