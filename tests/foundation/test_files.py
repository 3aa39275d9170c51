from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import locked, new_places, numbered, whole_file

fork = multiprocessing.get_context("fork")


def test_a_whole_file_replaces_the_one_before_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with whole_file(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.write("text")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_folders_without_a_name_are_not_overwritten(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="exists and is not overwritten"), new_places("--output", Path(place)):
        pass


def test_two_machines_that_write_one_place_do_not_share_a_temporary_one(tmp_path):
    """On a shared disk, and with equal process ids, as containers have them."""
    target = tmp_path / "file"

    def write(text: bytes, meanwhile=lambda: None) -> None:
        with new_places("--output", target) as (place,):
            place.write_bytes(text)
            meanwhile()

    with pytest.raises(UserError, match="exists and is not overwritten"):
        write(b"late", meanwhile=lambda: write(b"early"))
    assert target.read_bytes() == b"early"
    assert list(tmp_path.iterdir()) == [target]


def hold(folder: Path, pipe, wait: bool = False) -> None:
    """Lock the folder, say so, and keep it until told to let go; in another process."""
    try:
        with locked(folder, wait=wait):
            pipe.send("holds")
            pipe.recv()
    except BlockingIOError as error:
        pipe.send(str(error))
    pipe.send("let go")


@pytest.fixture
def holder(tmp_path):
    """Starts processes that `hold` the folder; each is returned with the pipe to it."""
    started = []

    def start(wait: bool = False):
        here, there = fork.Pipe()
        process = fork.Process(target=hold, args=(tmp_path / "new" / "folder", there, wait))
        process.start()
        started.append(process)
        return process, here

    yield start
    for process in started:
        process.kill()
        process.join()


def test_the_second_is_refused_with_the_name_of_the_first(holder, tmp_path):
    first, to_first = holder()
    assert to_first.recv() == "holds"
    _, to_second = holder()
    assert to_second.recv().startswith(f"process {first.pid} on ")
    to_first.send("enough")
    assert to_first.recv() == "let go"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_dies_with_its_process(holder):
    first, to_first = holder()
    assert to_first.recv() == "holds"
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    _, to_second = holder()
    assert to_second.recv() == "holds"


def test_one_that_waits_gets_it_though_the_folder_went_in_between(holder):
    _, to_first = holder()
    assert to_first.recv() == "holds"
    _, to_second = holder(wait=True)
    assert not to_second.poll(0.3)
    to_first.send("enough")
    assert to_first.recv() == "let go"
    assert to_second.recv() == "holds"
    _, to_third = holder()
    assert to_third.recv().startswith("process ")


def test_a_child_does_not_inherit_the_lock(holder, tmp_path):
    """As a data loader's worker, which outlives its killed parent for some seconds."""
    folder = tmp_path / "folder"
    ready, go_on = os.pipe()
    parent = os.fork()
    if parent == 0:
        with locked(folder):
            if os.fork() == 0:
                os.read(ready, 1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    with locked(folder):
        pass
    os.write(go_on, b"x")


def test_names_of_several_files():
    assert [numbered("sheet.png", number) for number in (1, 2, 10)] == ["sheet.png", "sheet_2.png", "sheet_10.png"]
