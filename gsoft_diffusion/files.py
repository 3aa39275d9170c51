"""Files that appear whole or not at all, and folders that one process has to itself."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from gsoft.whole_file import sync_folder, whole_file

__all__ = ["LOCK", "locked", "sync_folder", "whole_file"]

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Inside the block this process has the folder, which is made if need be, to itself among all that ask.

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
