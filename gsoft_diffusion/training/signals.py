"""Events from outside of a run: requests to stop or to draw, closed terminals, trackers that cannot write."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import Any, Self


class StopRequest(AbstractContextManager["StopRequest"]):
    """Inside the block SIGINT, SIGTERM and SIGHUP only set `requested`; a second one acts as usual.

    With a launcher it does not: launchers pass on what reaches them, and kill what takes too long. SIGHUP stays ignored
    where it was, as under nohup.
    """

    def __init__(self, launched: bool = False) -> None:
        """launched: whether a launcher has started this process and others with it."""
        self.requested = False
        self.launched = launched
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
            numbers = (signal.SIGINT, signal.SIGTERM, *hung_up)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if not self.launched:
            self._restore()
        if first:
            once_more = "" if self.launched else "; once more to stop at once"
            with suppress(OSError, RuntimeError):  # nobody may be listening, or another line be under way
                print(f"\nstopping after this step, then saving{once_more}", file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class DrawRequest(AbstractContextManager["DrawRequest"]):
    """Inside the block SIGUSR1 asks for a validation sheet after the current step (`kill -USR1 <process>`)."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            self._before = signal.signal(signal.SIGUSR1, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def taken(self) -> bool:
        """Whether a sheet was asked for since the last call."""
        requested, self.requested = self.requested, False
        return requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def no_drawing_yet() -> Iterator[None]:
    """Inside the block SIGUSR1, which would end the process, does nothing: a wish to see pictures came too early."""
    if threading.current_thread() is not threading.main_thread():  # signals reach no other
        yield
        return
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def leave_signals_to_the_run(_: int = 0) -> None:
    """For a run's worker processes, which signals to the whole group reach too: the run ends them when it is done."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Inside the block threads that cannot write end silently: TensorBoard's raises the error in the run as well."""

    def hook(ended: threading.ExceptHookArgs) -> None:
        if not isinstance(ended.exc_value, OSError):
            before(ended)

    before, threading.excepthook = threading.excepthook, hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Inside the block whoever reads stdout or stderr may leave, as `tee` does on Ctrl-C, and the run goes on."""
    with redirect_stdout(Stream(sys.stdout)), redirect_stderr(Stream(sys.stderr)):
        yield


class Stream:
    """A stream of text that shows everything at once, also in pipes and files, and nothing more once that fails."""

    def __init__(self, stream: Any) -> None:
        """stream: stdout or stderr."""
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text, if anybody reads it; returns its length."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self._show_nothing_more()
        return len(text)

    def flush(self) -> None:
        """Nothing is left to be flushed."""

    def _show_nothing_more(self) -> None:
        """Have the system drop what is written, so that Python can still empty the stream when the program ends."""
        with suppress(OSError, ValueError):  # a stream that is no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
