from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from gsoft_diffusion.training.signals import (
    Stderr,
    StopRequest,
    leave_signals_to_the_run,
    no_drawing_yet,
    quiet_writers,
)

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Gone:
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


def test_progress_is_shown_only_while_somebody_looks(monkeypatch, capsys):
    Stderr().write("10 %")
    assert capsys.readouterr().err == "10 %"
    monkeypatch.setattr(sys, "stderr", Gone())
    Stderr().write("20 %")
    Stderr().flush()
