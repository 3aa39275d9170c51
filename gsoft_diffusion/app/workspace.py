"""The folder that a page serves. Of what is outside of it, the page reads only base models.

A base model may be anywhere on this machine: step 2 asks for its folder or file, as the commands do. So whoever may
open the page may ask whether a path is there, and may train with a base model and take it home.

<folder>/                  outputs, unless told otherwise
    my-dog/                a run, as gsoft-train writes it; also those that were started without the page
    app/
        subjects/my-dog/   its photos, those that were removed, what it is called, and what was chosen for it
        jobs/0001/         what was asked for: training, drawing, export; its settings, its log, how it ended
        uploads/           files on their way in
        deleted/           what is being deleted
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gsoft.whole_file import whole_file
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import ADAPTER, SETTINGS

OWN = "app"  # the folder beside the runs
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,59}")


class Workspace:
    """A page's folder: where things are in it, and that what is asked for is in it."""

    def __init__(self, root: Path) -> None:
        """root: its path; it is made if it is not there. Raises UserError if that cannot be done."""
        self.root = Path(os.path.realpath(root))
        own = self.root / OWN
        self.subjects, self.jobs, self.uploads = own / "subjects", own / "jobs", own / "uploads"
        self.deleted = own / "deleted"
        try:
            for folder in (self.subjects, self.jobs, self.uploads, self.deleted):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--folder {root}: cannot be written ({error.strerror})") from error

    def runs(self) -> list[str]:
        """The names of the runs in the folder, the latest first.

        Links to elsewhere are none, and names that no browser can be told are left out.
        """
        found = [
            path
            for path in self.root.iterdir()
            if path.is_dir()
            and not path.is_symlink()
            and path.name != OWN
            and path.name.isprintable()
            and any((path / name).is_file() for name in (SETTINGS, ADAPTER))
        ]
        return [path.name for path in latest_first(found)]

    def run(self, name: str) -> Path:
        """The folder of a run. Raises UserError if there is none of that name."""
        if name not in self.runs():
            raise UserError(f"there is no run {name}")
        return self.root / name

    def new_run(self, name: str) -> Path:
        """A path for a run at which there is nothing: `my-dog`, else `my-dog-2` and so on."""
        taken = {path.name.casefold() for path in self.root.iterdir()} | {  # Dog and dog may be one to a file system
            str(values.get("run")).casefold() for values in map(read_json, self.jobs.glob("*/job.json"))
        }
        candidate, number = name, 1
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{name}-{number}"
        return self.root / candidate


def latest_first(folders: Iterable[Path]) -> list[Path]:
    """Folders by the time of their last change, the latest first. Those that went away meanwhile are left out."""
    changed: dict[Path, float] = {}
    for folder in folders:
        with suppress(OSError):
            changed[folder] = folder.stat().st_mtime
    return sorted(changed, key=lambda folder: changed[folder], reverse=True)


def inside(folder: Path, name: str) -> Path:
    """A file below a folder. Raises UserError if there is none such, or if a link or `..` leads to it.

    folder: without links in its path. name: with slashes, as in an address.
    """
    path = folder / name
    if os.path.realpath(path) != str(path) or not path.is_relative_to(folder) or not path.is_file():
        raise UserError(f"there is no file {name}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the page's own, nothing if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object to a file, completely or not at all. Raises UserError if it cannot be written."""
    try:
        with whole_file(path) as file:
            file.write(json.dumps(values, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
