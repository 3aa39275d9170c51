"""Where the bundled files are, `data/` and `eval/experiments/`, in a checkout and in an installation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# The repository, if this package lies in it. The wheel has `data/` inside of the package instead; see setup.py.
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "train_dreambooth_gsoft.py").is_file() else None
_PARENTS = {"data": CHECKOUT or _PACKAGE, "eval": _PACKAGE.parent}


def places(name: str | Path) -> Iterator[Path]:
    """The paths that a name may mean, the first choice first.

    These are the path as given, with `~` for the home folder, and for a name such as `data/mini_base` the bundled file
    or folder. None of them needs to exist.
    """
    yield Path(name).expanduser()
    parts = Path(name).parts
    if parts and parts[0] in _PARENTS and ".." not in parts:
        yield _PARENTS[parts[0]] / name


def lasting_path(place: Path) -> str:
    """An absolute path as text. A bundled file gets the name that it has on every machine, such as `data/mini_base`."""
    for folder, parent in _PARENTS.items():
        if place.is_relative_to(parent / folder):
            return place.relative_to(parent).as_posix()
    return str(place)


def found(name: str | Path) -> Path:
    """The first of `places` at which there is something; where there is nothing, the path as given."""
    given, *others = places(name)
    return next((place for place in (given, *others) if place.exists()), given)
