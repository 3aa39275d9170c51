"""A modest number of hostile adapter files; `make fuzz` tries a hundred thousand, see docs/reliability.md."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import fuzz_adapter
import pytest

from gsoft.file import MAX_HEADER
from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.foundation.errors import UserError


def test_the_file_that_is_changed_is_valid(tmp_path):
    assert fuzz_adapter.check(tmp_path / "adapter", fuzz_adapter.VALID) == "read"


@pytest.mark.slow
def test_hostile_files_are_read_or_refused():
    command = [sys.executable, fuzz_adapter.__file__, "--cases", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    cases, read = (int(done.stdout.partition(word)[2].split()[0].strip(",;")) for word in ("cases:", "valid:"))
    assert cases >= 1000
    assert 0 < read < cases / 2  # both happen


@pytest.mark.parametrize(
    "reader", [lambda *_: os.kill(os.getpid(), signal.SIGKILL), lambda *_: time.sleep(600)], ids=["crash", "hang"]
)
def test_a_file_that_crashes_or_hangs_the_reader_ends_the_fuzzer(monkeypatch, reader):
    monkeypatch.setattr(fuzz_adapter, "HANG", 1)
    monkeypatch.setattr(fuzz_adapter, "check", reader)
    with pytest.raises(SystemExit, match=r"seed 7: one of 5 files crashed the reader, or hung it for 1 seconds"):
        fuzz_adapter.round_in_a_process(7, 5)


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["[],", '{"a":1},'])
def test_the_largest_header_takes_no_more_memory_than_is_stated(tmp_path, piece):
    """What grows most when it is parsed, as much as a header may hold of it, in a process with an end to its memory."""
    length = MAX_HEADER - 10_000
    header = fuzz_adapter.HEADER | {"__metadata__": fuzz_adapter.HEADER["__metadata__"] | {"training": "SECTION"}}
    quoted = json.dumps(piece)[1:-1]
    text = json.dumps(header).replace('"SECTION"', '"{\\"a\\": [' + quoted * (length // len(quoted)) + '0]}"').encode()
    assert len(text) < MAX_HEADER
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + fuzz_adapter.DATA)
    script = """
import resource, sys
from pathlib import Path
from fuzz_adapter import MEMORY
from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.foundation.errors import UserError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
try:
    read_adapter(sys.argv[1])
except UserError as error:
    print(error)
"""
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, path], cwd=tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_header_that_is_longer_is_refused_unread(tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER + 1) + b" " * (MAX_HEADER + 1))
    with pytest.raises(UserError, match="header claims 4194305 bytes"):
        read_adapter(path)
