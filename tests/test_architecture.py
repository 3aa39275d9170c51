"""docs/architecture.md names every room, and the pages name files that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["eval/README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md")))]


def test_every_room_is_described():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "gsoft_diffusion").glob("*/__init__.py")]
    assert len(rooms) == 10
    assert [room for room in rooms if f"| `{room}/` |" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    packages = "gsoft|gsoft_diffusion|eval|pretraining|benchmarks|examples|tests"
    named = re.findall(rf"\b(?:{packages})/[\w/]+\.py\b", (ROOT / page).read_text())
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_the_functions_on_the_ways_are_there():
    """Each `name` that is followed by its (`file.py`) is defined in it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w.]+)`[^`|]*\(`([\w/]+\.py)`\)", text)
    assert len(named) > 15
    for name, path in named:
        assert re.search(rf"^\s*(?:class|def) {name.rpartition('.')[2]}\b", (ROOT / path).read_text(), re.M), name
