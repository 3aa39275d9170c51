"""A folder that another process has to itself, for tests of what a second run says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD = """
import sys, time
from pathlib import Path
from gsoft_diffusion.foundation.files import locked
with locked(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(float(sys.argv[2]))
    {what}
"""


@contextmanager
def held(folder: Path, seconds: float, what: str = "pass") -> Iterator[int]:
    """Inside the block a process, whose number it is, has the folder for so long, and does `what` at the end."""
    command = [sys.executable, "-c", HOLD.format(what=what), str(folder), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        try:
            yield process.pid
        finally:
            process.kill()
