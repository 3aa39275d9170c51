"""What base models are called: by an absolute path among the run's own files, without any folder before others."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLED_BASE = "data/mini_base"  # found in the repository whatever the working directory


def local_model(name: str) -> Path | None:
    """The absolute path of a model's folder or file on this disk, as named or inside this repository; None if there is
    none, and the name may be one on the hub.
    """
    for place in (Path(name).expanduser(), REPOSITORY / name):
        with suppress(OSError):  # of a folder around it that may not be entered
            if place.exists():
                return Path(os.path.abspath(place))  # noqa: PTH100 - keeps links
    return None


def lasting_name(name: str) -> str:
    """A name that means the same model from every directory: its path, its name on the hub, or the bundled one's."""
    place = local_model(name)
    if place is None:
        return name
    return BUNDLED_BASE if place == REPOSITORY / BUNDLED_BASE else str(place)


def public_name(name: str) -> str:
    """A name that tells nothing of this disk: without the folders around a local model."""
    lasting = lasting_name(name)
    return Path(lasting).name if Path(lasting).is_absolute() else lasting
