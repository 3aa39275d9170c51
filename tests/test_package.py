"""What `import gsoft_diffusion` offers, which is loaded when asked for."""

from __future__ import annotations

import subprocess
import sys
from inspect import isclass, isfunction

import pytest

import gsoft_diffusion


def test_every_public_name_is_there():
    names = set(gsoft_diffusion.__all__)
    assert names <= set(dir(gsoft_diffusion))
    found = {name: getattr(gsoft_diffusion, name) for name in names - {"__version__"}}
    assert all(isclass(value) or isfunction(value) for value in found.values())  # a module of the name would hide it


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = gsoft_diffusion.Nothing


def test_what_is_not_installed_is_named_with_the_extra_that_has_it():
    code = "import sys; sys.modules |= dict.fromkeys(['diffusers', 'yaml']); import gsoft, gsoft_diffusion"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "gsoft_diffusion needs diffusers, yaml" in done.stderr
    assert 'pip install "gsoft-diffusion[diffusion]"' in done.stderr


def test_windows_is_told_what_works_there():
    code = "import sys; sys.platform = 'win32'; import gsoft_diffusion"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: gsoft_diffusion needs Linux, macOS or, on Windows, WSL"
    )


def test_importing_it_does_not_load_pytorch():
    code = "import sys, gsoft_diffusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
