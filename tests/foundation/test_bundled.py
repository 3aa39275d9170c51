from __future__ import annotations

from pathlib import Path

import pytest

from gsoft_diffusion.foundation.bundled import CHECKOUT, found, lasting_path, places

REPOSITORY = Path(__file__).resolve().parents[2]


def test_these_tests_run_in_a_checkout():
    assert CHECKOUT == REPOSITORY


@pytest.mark.parametrize("name", ["data/mini_base", "data/prompts/objects.txt", "eval/experiments/mini_prompts.txt"])
def test_bundled_files_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert found(name) == REPOSITORY / name
    assert found(name).exists()
    assert lasting_path(found(name)) == name


def test_a_file_of_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mini_base").mkdir(parents=True)
    assert found("data/mini_base").samefile(tmp_path / "data" / "mini_base")


@pytest.mark.parametrize("name", ["gsoft_diffusion", "tests", "data/../tests", "database", ""])
def test_nothing_else_in_the_repository_is_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(places(name)) == [Path(name)]
    assert found(name) == Path(name)


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(places("~/dog")) == [tmp_path / "dog"]


def test_other_paths_last_as_they_are(tmp_path):
    assert lasting_path(tmp_path / "dog") == str(tmp_path / "dog")
    assert lasting_path(REPOSITORY / "outputs" / "dog") == str(REPOSITORY / "outputs" / "dog")
