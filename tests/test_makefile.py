"""How the Makefile sets up `.venv`, with programs that stand for Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make_venv(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    """What make says when it sets up a venv in the folder. python: the lines of a shell script that stands for it."""
    shutil.copy(REPOSITORY / "Makefile", folder)
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{python}\n")
    script.chmod(0o755)
    command = ["make", ".venv/bin/python", f"PYTHON={script}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_an_old_python_is_named(tmp_path):
    done = make_venv(tmp_path, f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9); $2"')
    assert f"error: {tmp_path}/python is older than Python 3.11; give another: make PYTHON=<path>" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_venv_that_failed_halfway_is_made_again(tmp_path):
    """As Debian's is without python3-venv: it has a python, but no pip."""
    halfway = 'mkdir -p .venv/bin; ln -sf /bin/sh .venv/bin/python; [ -e installed ] && echo "made"'
    python = f'if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi; {halfway}'
    assert make_venv(tmp_path, python).returncode != 0
    (tmp_path / "installed").touch()
    again = make_venv(tmp_path, python)
    assert again.returncode == 0, again.stderr
    assert "made" in again.stdout.splitlines()
