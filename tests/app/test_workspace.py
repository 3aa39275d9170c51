"""The page's folder: what is in it, and that nothing else is reached through it."""

from __future__ import annotations

import os

import pytest
from page_folders import write_run

from gsoft_diffusion.app.workspace import Workspace, inside, latest_first, read_json, write_json
from gsoft_diffusion.foundation.errors import UserError


def test_runs_are_folders_with_settings_or_an_adapter_the_latest_first(workspace):
    for age, name in enumerate(("old", "new")):
        os.utime(write_run(workspace.root / name), (age, age))
    (workspace.root / "other").mkdir()
    (workspace.root / "file").write_text("x")
    assert workspace.runs() == ["new", "old"]
    assert workspace.run("old") == workspace.root / "old"


def test_a_name_that_no_browser_can_be_told_is_left_out(workspace):
    """As an archive from another system may leave it; the page would show nothing at all."""
    write_run(workspace.root / os.fsdecode(b"caf\xe9"))
    write_run(workspace.root / "café")
    assert workspace.runs() == ["café"]


def test_a_folder_that_goes_away_meanwhile_is_left_out(tmp_path):
    assert latest_first([tmp_path / "gone", tmp_path]) == [tmp_path]


def test_a_new_run_takes_no_name_that_differs_in_capitals_only(workspace):
    write_run(workspace.root / "Dog")
    assert workspace.new_run("dog") == workspace.root / "dog-2"


@pytest.mark.parametrize("name", ["", "..", ".", "app", "nowhere", "../outputs/old", "old/../old", "old/", "/etc"])
def test_what_is_no_run_is_refused(workspace, name):
    write_run(workspace.root / "old")
    with pytest.raises(UserError, match="there is no run"):
        workspace.run(name)


def test_a_link_to_elsewhere_is_no_run(workspace, tmp_path):
    write_run(tmp_path / "elsewhere")
    (workspace.root / "link").symlink_to(tmp_path / "elsewhere")
    assert workspace.runs() == []
    with pytest.raises(UserError):
        workspace.run("link")


def test_a_file_is_reached_by_its_own_path_only(tmp_path):
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_text("a")
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    assert inside(folder, "images/a.png").read_text() == "a"
    for name in (
        "link",
        "linked/secret",
        "../secret",
        "images/../images/a.png",
        str(tmp_path / "secret"),
        "images",
        "",
    ):
        with pytest.raises(UserError, match="there is no file"):
            inside(folder, name)


def test_a_new_run_takes_no_name_that_is_taken_or_promised(workspace):
    assert workspace.new_run("dog").name == "dog"
    write_run(workspace.root / "dog")
    (workspace.jobs / "0001").mkdir()
    write_json(workspace.jobs / "0001" / "job.json", {"kind": "train", "run": "dog-2"})
    assert workspace.new_run("dog").name == "dog-3"
    assert workspace.new_run("app").name == "app-2"


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_an_object_that_cannot_be_read_is_empty(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") == {}


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--folder .*file/x: cannot be written"):
        Workspace(tmp_path / "file" / "x")
