"""Files and folders that appear complete or not at all, with the user's permissions; and exclusive locks on folders."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from gsoft.whole_file import sync_folder, whole_file
from gsoft_diffusion.foundation.errors import UserError, first_line

__all__ = [
    "LOCK",
    "check_writable",
    "give_usual_modes",
    "locked",
    "new_places",
    "numbered",
    "refuse_existing",
    "sync_folder",
    "whole_file",
]

LOCK = ".lock"


def check_writable(folder: Path, what: str) -> None:
    """Raise UserError if no file can be made in the folder, or the folder not be made; leaves no trace.

    folder: need not exist. what: the flag that named it, or the like, for the message.

    Call it before the slow work whose result goes there.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder, prefix=".").close()
    except OSError as error:
        raise UserError(f"{what} {folder}: cannot be written ({error.strerror}); choose another folder") from error
    finally:
        with suppress(OSError):  # not empty: another has come
            for place in made:
                place.rmdir()


@contextmanager
def new_places(flag: str, *targets: Path) -> Iterator[list[Path]]:
    """A temporary path for each target, a file or folder. All are renamed at the end of the block, or removed.

    flag: the option that named the targets, for messages.
    targets: paths at which there must be nothing yet; folders around them are made.

    Before the block it is seen to that something can be written there. Raises UserError if it cannot, or if there is
    something at one of the targets already.
    """
    for target in targets:
        refuse_existing(target, flag)  # before the name is asked for, which `.` has not
    unfinished = [target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp") for target in targets]
    made = [folder for target in targets for folder in target.parents if not folder.exists()]
    try:
        for target, place in zip(targets, unfinished, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            place.touch(exist_ok=False)
            place.unlink()
        yield unfinished
        for target, place in zip(targets, unfinished, strict=True):
            give_usual_modes(place)
            refuse_existing(target, flag)  # not even what came while this was written
        for target, place in zip(targets, unfinished, strict=True):
            place.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag}: cannot write {targets[0]} ({first_line(error)})") from error
    finally:
        for place in unfinished:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):
                place.unlink()
        for folder in made:
            with suppress(OSError):  # what has something in it stays
                folder.rmdir()


def refuse_existing(path: Path, flag: str) -> None:
    """Raise UserError if there is something at this path already, a dangling link included.

    path: to be written. flag: the option that chooses another, for the message.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists and is not overwritten: choose another name with {flag}")


def give_usual_modes(place: Path) -> None:
    """Give a file, or all files in a folder, the mode that new files have: safetensors lets only their owner read."""
    umask = os.umask(0o077)  # the only way to read it
    os.umask(umask)
    for path in (place, *place.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~umask)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the folder, which is created if it does not exist.

    The lock ends with the process, however that ends. Folders that were made go again if they are still empty then.

    wait: until it is free; otherwise raises BlockingIOError with the holder's name. Other trouble is an OSError.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with _lock_file(folder, wait) as file:
        try:
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
            yield
        finally:
            with suppress(OSError):  # it may have become read-only; the lock ends all the same
                (folder / LOCK).unlink(missing_ok=True)
                for place in made:
                    place.rmdir()


def _lock_file(folder: Path, wait: bool) -> TextIO:
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            # Of the locks there are, the one that belongs to the process: those of open files live on in its children.
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):  # gone, or another's, if the holder before us was done meanwhile
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return file
        except (BlockingIOError, PermissionError) as error:  # systems differ in what they say
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise BlockingIOError(holder) from error
        file.close()


def numbered(name: str, number: int) -> str:
    """The file name of one of several sheets: the first has the plain name, further ones a number before the suffix.

    name: with its suffix. number: which sheet, from 1.
    """
    stem, dot, suffix = name.rpartition(".")
    return name if number == 1 else f"{stem}_{number}{dot}{suffix}"
