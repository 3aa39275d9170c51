"""The README's commands say only what the scripts understand, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gsoft_diffusion.config import AppConfig, ExportConfig, GenerationConfig, TrainingConfig
from gsoft_diffusion.config.command_line import parse

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "train_dreambooth_gsoft.py": TrainingConfig,
    "inference.py": GenerationConfig,
    "export.py": ExportConfig,
    "gsoft-train": TrainingConfig,
    "gsoft-draw": GenerationConfig,
    "gsoft-export": ExportConfig,
    "gsoft-app": AppConfig,
}


def commands() -> list[list[str]]:
    """Every call of the project's scripts and console scripts in the documents' shell blocks."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            match = re.search(r"(?:python\S* (\w+\.py)|^(gsoft-\w+)) (--.*)", line)
            if match:
                found.append([match[1] or match[2], *shlex.split(match[3], comments=True)])
    return found


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_command_is_understood(command):
    parse(SETTINGS[command[0]], "", command[1:])


def test_there_are_commands_to_check():
    assert {command[0] for command in commands()} == set(SETTINGS)


def test_readme_is_read_in_three_minutes():
    assert 500 <= len((ROOT / "README.md").read_text().split()) <= 600


PAGES = [
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*/README.md"), *sorted((ROOT / "docs").glob("*.md")))
]


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_python_on_a_plain_model_runs(page, tmp_path, monkeypatch):
    """The page's blocks of Python that use the library, one after the other."""
    monkeypatch.chdir(tmp_path)
    blocks = [
        code for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if "gsoft." in code
    ]
    assert blocks
    exec("\n".join(blocks), {})
    assert (tmp_path / "adapter.safetensors").is_file()
