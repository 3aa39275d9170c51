"""Which base model an adapter belongs to: recognised by shapes and by a sketch of the weights, in any dtype."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SKETCH_SIZE = 16
SKETCH_TOLERANCE = 0.01


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
    less than about half a percent pass as the same.
    """
    digest = hashlib.sha256(json.dumps(architecture).encode()).hexdigest()[:16]
    groups = [weights[start::SKETCH_SIZE] for start in range(min(SKETCH_SIZE, len(weights)))]
    sketch = [sum(map(_sketch, group)) / math.sqrt(len(group)) for group in groups]
    return ":".join([digest, *(f"{number:+.4f}" for number in sketch)])


@torch.no_grad()
def _sketch(weight: Tensor) -> float:
    """`uᵀWv / ‖W‖` with fixed wave-like `u` and `v`: over unrelated weights, about a standard normal number."""
    u, v = (torch.arange(1, side + 1).float().cos() * math.sqrt(2) for side in weight.shape)
    weight = weight.detach().cpu().float()
    return (u @ weight @ v / weight.norm().clamp(min=1e-12)).item()


def is_fingerprint(text: str) -> bool:
    """Whether a text has the form that `fingerprint` gives."""
    return re.fullmatch(r"[0-9a-f]{16}(:[+-]\d{1,4}\.\d{4})*", text) is not None


def difference(expected: str, given: str) -> str | None:
    """What two fingerprints disagree in, in words that follow "has", or None if they are of one model.

    expected, given: as `fingerprint` makes them; the order does not matter. Sketches are compared within 0.01.
    """
    (expected_digest, *expected_sketch), (given_digest, *given_sketch) = expected.split(":"), given.split(":")
    if expected_digest != given_digest or len(expected_sketch) != len(given_sketch):
        return "another architecture"
    distances = [abs(float(a) - float(b)) for a, b in zip(expected_sketch, given_sketch, strict=True)]
    return "other weights" if max(distances, default=0.0) > SKETCH_TOLERANCE else None


def name_of(model: nn.Module) -> str:
    """What people call the model: its name on the hub or its folder, as far as it knows it, else its class."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or type(model).__name__
