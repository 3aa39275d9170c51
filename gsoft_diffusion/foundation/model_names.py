"""Names of base models: absolute paths in the run's own files, and no folders in what others read."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from gsoft_diffusion.foundation.bundled import lasting_path, places

BUNDLED_BASE = "data/mini_base"  # found from every working directory; see bundled.py


def local_model(name: str) -> Path | None:
    """The absolute path of a model's folder or file on this disk, as named or bundled; else None.

    A name without a path may be one on the hub.
    """
    for place in places(name):
        with suppress(OSError):  # of a folder around it that may not be entered
            if place.exists():
                return Path(os.path.abspath(place))  # noqa: PTH100 - keeps links
    return None


def lasting_name(name: str) -> str:
    """A name that means the same model in every directory: a path, a name on the hub, or a bundled name."""
    place = local_model(name)
    return name if place is None else lasting_path(place)


def public_name(name: str) -> str:
    """A name that others may read: a local model's without its folders."""
    lasting = lasting_name(name)
    return Path(lasting).name if Path(lasting).is_absolute() else lasting
