"""Files that appear complete or not at all; see also tests/foundation/test_files.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gsoft.whole_file import whole_file


def test_windows_opens_no_folders(tmp_path, monkeypatch):
    opened = os.open

    def windows_open(path, *arguments, **options):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", windows_open)
    with whole_file(tmp_path / "file") as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_two_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    """As processes on two machines that share a disk, whose ids may be equal."""
    path = tmp_path / "file"
    with whole_file(path) as first:
        first.write(b"first")
        with whole_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
