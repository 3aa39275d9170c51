"""The README's commands say only what the scripts understand, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from importlib import import_module
from importlib.util import find_spec
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


def flags_of_programs() -> dict[str, set[str]]:
    """The flags of every `python -m <one of the programs>`, in shell blocks and in `code`."""
    found = defaultdict(set)
    for page in ("README.md", *PAGES):
        text = (ROOT / page).read_text().replace("\\\n", " ")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        lines = [line for block in blocks for line in block.splitlines()] + [" ".join(span.split()) for span in spans]
        for line in lines:
            if match := re.search(r"python -m ((?:benchmarks|eval|examples|pretraining)\.[\w.]+)(.*)", line):
                found[match[1]] |= set(re.findall(r"--[\w-]+", match[2].partition(" # ")[0]))
    return found


PROGRAMS = flags_of_programs()


@pytest.mark.parametrize("module", sorted(PROGRAMS))
def test_programs_have_the_flags_that_pages_give_them(module, monkeypatch, capsys):
    is_package = find_spec(module).submodule_search_locations is not None
    program = import_module(f"{module}.__main__" if is_package else module)
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit):
        program.main()
    assert PROGRAMS[module] - set(re.findall(r"--[\w-]+", capsys.readouterr().out)) == set()


def test_there_are_programs_to_check():
    assert {"benchmarks.step", "eval.report", "examples.language.train", "pretraining.render"} <= PROGRAMS.keys()
    assert "--latents" in PROGRAMS["benchmarks.step"]  # in `code` that goes over two lines


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
