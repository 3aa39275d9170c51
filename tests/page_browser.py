"""A page of its own process, and a real browser that looks at it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from page_folders import until

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


def browser_path() -> str | None:
    """The browser on this machine, None if there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Server:
    """gsoft-app in a process of its own, which can be ended and started anew at the same address."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        command = [sys.executable, "-m", "gsoft_diffusion.app", "--folder", str(self.folder), "--no_open_browser"]
        with self.log.open("ab") as log:
            before = log.tell()
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *options],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

        def said() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            return b"the page is at" in self.log.read_bytes()[before:]

        until(said, "address of the page")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def opened_browser() -> Iterator[Any]:
    """Playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS, headless=True)
        yield browser
        browser.close()


class Visit:
    """A person's visit to the page.

    complaints: what the browser says is wrong. missing: addresses that it asked the page for in vain, but for events,
    which are lost when a page is killed. elsewhere: what it asked others for.
    """

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        options = {"viewport": {"width": 1280, "height": 900}} | options
        self.page = browser.new_context(accept_downloads=True, **options).new_page()
        self.page.set_default_timeout(180_000)
        self.complaints: list[str] = []
        self.missing: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda said: self._said(said.type, said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("response", lambda answer: self._answered(answer.status, answer.url))
        self.page.on("request", lambda asked: self._asked(asked.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#subject")
        self.wait(lambda: self.text("called"), "word of what comes first")  # the page has been filled

    def _said(self, kind: str, text: str) -> None:
        if kind == "error" and not text.startswith("Failed to load resource"):  # which `missing` says better
            self.complaints.append(text)

    def _answered(self, status: int, url: str) -> None:
        if status >= 400 and "/gradio_api/queue/data" not in url:
            self.missing.append(f"{status} {url}")

    def _asked(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def step(self, name: str) -> None:
        """Open one of the page's steps."""
        self.page.get_by_role("tab", name=name).click()

    def fill(self, field: str, text: str) -> None:
        """Write into a field by its id, again if the page was still showing what an earlier press has changed."""
        place = self.page.locator(f"#{field} input, #{field} textarea").first

        def written() -> bool:
            place.fill(text)
            self.page.wait_for_timeout(500)
            return bool(place.input_value() == text)

        self.wait(written, f"{text!r} in {field}")

    def text(self, field: str) -> str:
        """What an element shows, "" where it is empty."""
        found = self.page.locator(f"#{field}")
        return found.inner_text() if found.count() and found.first.is_visible() else ""

    def wait(self, there: Callable[[], Any], what: str) -> Any:
        """Wait for something to be so, while the page goes on."""

        def now() -> Any:
            self.page.wait_for_timeout(200)
            return there()

        try:
            return until(now, what)
        except AssertionError as error:
            shown = self.page.locator("body").inner_text()
            raise AssertionError(f"{error}; the page shows:\n{shown}\nand complains: {self.complaints}") from error

    def close(self) -> None:
        self.page.context.close()
