"""What pip installs: the packages with the bundled files, three commands, and the extras that pyproject.toml names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
PACKAGES = ("gsoft", "gsoft_diffusion", "eval")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `pip install .` builds, from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("installation") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in (*PACKAGES, "data"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD, str(copy)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(copy.glob("*.whl"))) as file:
        yield file


def text(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }


def test_every_module_and_bundled_file_is_in_the_wheel(wheel):
    expected = {f"{package}/{path}" for package in PACKAGES for path in files(REPOSITORY / package)}
    expected |= {f"gsoft_diffusion/data/{path}" for path in files(REPOSITORY / "data")}
    assert "gsoft_diffusion/data/mini_base/model_index.json" in expected
    expected -= {"eval/README.md"}
    assert {path for path in wheel.namelist() if ".dist-info/" not in path} == expected


def test_the_bundled_weights_are_in_the_wheel_as_they_are(wheel):
    for path in (REPOSITORY / "data").rglob("*.safetensors"):
        assert wheel.read(f"gsoft_diffusion/data/{path.relative_to(REPOSITORY / 'data')}") == path.read_bytes()


def test_installed_commands_find_the_bundled_files(wheel, tmp_path):
    """The unpacked wheel before everything else on the path, as in site-packages, and no checkout around it."""
    wheel.extractall(tmp_path / "site")
    code = (
        "from gsoft_diffusion.foundation.bundled import found, lasting_path;"
        "from gsoft_diffusion.config.command_line import command;"
        "from eval.prompts import read_templates; names = ['data/mini_base', 'eval/experiments/mini_prompts.txt'];"
        "print([lasting_path(found(name)) for name in names] == names, command('gsoft-train'),"
        " len(read_templates('dreambooth', True)))"
    )
    (tmp_path / "elsewhere").mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
    )
    assert done.stdout == "True gsoft-train 25\n", done.stderr


def test_commands(wheel):
    assert text(wheel, "entry_points.txt").split() == [
        "[console_scripts]",
        *("gsoft-app", "=", "gsoft_diffusion.app.__main__:main"),
        *("gsoft-draw", "=", "gsoft_diffusion.commands:draw"),
        *("gsoft-export", "=", "gsoft_diffusion.commands:export"),
        *("gsoft-train", "=", "gsoft_diffusion.commands:train"),
    ]


def requirements(wheel: zipfile.ZipFile, extra: str = "") -> set[str]:
    """The names of what is installed, with the extra's own extras."""
    metadata = Parser().parsestr(text(wheel, "METADATA"))
    assert metadata["Version"] == "0.1.0"
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    chosen = [one for one in found if one.marker is None or (extra and one.marker.evaluate({"extra": extra}))]
    names = {one.name.lower().replace("_", "-") for one in chosen if not one.extras}
    return names.union(*(requirements(wheel, more) for one in chosen for more in one.extras))


def pinned(name: str) -> set[str]:
    lines = (REPOSITORY / name).read_text().splitlines()
    return {Requirement(line).name.lower().replace("_", "-") for line in lines if line and line[0] not in "#-"}


def specifiers(lines: Iterable[str]) -> dict[str, SpecifierSet]:
    found = map(Requirement, lines)
    return {one.name.lower().replace("_", "-"): one.specifier for one in found if not one.extras}


def test_the_requirements_have_the_bounds_of_the_extras_or_a_version_within_them(wheel):
    declared = specifiers(Parser().parsestr(text(wheel, "METADATA")).get_all("Requires-Dist", []))
    for path in REPOSITORY.glob("requirements*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#-"]
        for name, given in specifiers(lines).items():
            (first, *_) = given or [None]
            if first is not None and first.operator == "==":
                assert declared[name].contains(first.version), (path.name, name)
            else:
                assert given == declared[name], (path.name, name)


def test_the_library_alone_needs_three_packages(wheel):
    assert requirements(wheel) == {"torch", "numpy", "safetensors"}


def test_extras_name_what_the_requirements_pin(wheel):
    everything = pinned("requirements.txt")
    assert requirements(wheel, "diffusion") == everything - {"open-clip-torch", "scipy"}
    assert requirements(wheel, "eval") == everything
    assert requirements(wheel, "lipconvnet") == requirements(wheel, "diffusion") | {"foolbox"}
    assert requirements(wheel, "cluster") == everything | pinned("requirements-cluster.txt")
    assert requirements(wheel, "app") == everything | pinned("requirements-app.txt")
    assert requirements(wheel, "gpu") == everything - {"open-clip-torch", "scipy"} | pinned("requirements-gpu.txt")
    dev = pinned("requirements-app.txt") | pinned("requirements-dev.txt")
    assert requirements(wheel, "dev") == everything | dev
