from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from subprocess import PIPE

import pytest

from gsoft_diffusion.training.signals import (
    StopRequest,
    leave_signals_to_the_run,
    no_drawing_yet,
    quiet_writers,
    readers_may_leave,
)

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Gone(io.TextIOBase):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        self.write("")


@pytest.fixture(autouse=True)
def handlers_as_before():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_request_to_stop_counts_whether_or_not_anybody_listens(monkeypatch, number):
    monkeypatch.setattr(sys, "stderr", Gone())
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested


def test_hanging_up_is_ignored_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested


def test_a_wish_to_see_pictures_ends_no_run_that_cannot_draw_yet():
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with no_drawing_yet():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_workers_leave_signals_to_the_run():
    leave_signals_to_the_run(0)
    for number in NUMBERS:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("error", "passed_on"), [(OSError(28, "full"), False), (ValueError("a bug"), True)])
def test_threads_that_cannot_write_end_silently(monkeypatch, error, passed_on):
    def write() -> None:
        raise error

    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    with quiet_writers():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert [each.exc_value for each in told] == [error] * passed_on
    assert threading.excepthook == told.append


def test_what_nobody_reads_ends_no_run(monkeypatch, capsys):
    with readers_may_leave():
        print("10 %")
        print("a note", file=sys.stderr)
    assert capsys.readouterr() == ("10 %\n", "a note\n")
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    with readers_may_leave():
        print("20 %", flush=True)
        print("a note", file=sys.stderr)


PRINTS = """
import sys
from gsoft_diffusion.training.signals import readers_may_leave
with readers_may_leave():
    print("first")
    sys.stdin.readline()
    print("second")
    print("third", file=sys.stderr)
sys.exit(130)
"""


def test_a_program_whose_reader_has_left_ends_as_it_would_have():
    """Also where Python would have kept lines for a pipe until the end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = [sys.executable, "-c", PRINTS]
    with subprocess.Popen(program, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == "third\n"
    assert process.returncode == 130
