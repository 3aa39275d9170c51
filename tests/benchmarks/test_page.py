from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

from benchmarks.page import reach


def test_a_run_that_has_ended_is_not_waited_for(tmp_path):
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit('error: no such photos')"], stderr=said)
        with pytest.raises(SystemExit, match="the run ended with status 1: error: no such photos"):
            reach(tmp_path, 1, run, said)
