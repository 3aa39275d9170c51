"""Starting the page: what is refused before anything is served, and the address."""

from __future__ import annotations

import os
import signal
import socket
import sys
import urllib.request
from dataclasses import replace

import pytest
from page_browser import Server

from gsoft_diffusion.app import server as module
from gsoft_diffusion.app.__main__ import _main
from gsoft_diffusion.config import AppConfig
from gsoft_diffusion.config.command_line import parse
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import locked


@pytest.fixture
def config(tmp_path) -> AppConfig:
    return AppConfig(str(tmp_path / "outputs"), port=0, open_browser=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others can reach the page there, so it needs a password"),
        (["--port", "65536"], "--port 65536: must be from 0 to 65535"),
        (["--folder", "/proc/nowhere"], "--folder /proc/nowhere: cannot be written"),
        (["--password_file", "nowhere"], "--password_file: cannot be read"),
        (
            ["--host", "no.such.host.invalid", "--password_file", "right"],
            "--host no.such.host.invalid --port None: cannot listen",
        ),
        (["--password_file", "short"], "--password_file short: its first line needs 8 characters or more"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("seven77\nand a long second line\n")
    (tmp_path / "right").write_text("correct horse\n")
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("the page was served"))
    monkeypatch.setattr(sys, "argv", ["gsoft-app", "--no_open_browser", *options])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match=says):
            _main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gsoft_diffusion.app.__main__.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["gsoft-app"])
    with pytest.raises(UserError, match=r'pip install "gsoft-diffusion\[app\]"'):
        _main()


def test_by_default_only_this_machine_reaches_it():
    config = parse(AppConfig, "", [])
    assert (config.host, config.password_file) == ("127.0.0.1", None)


def test_a_second_page_of_a_folder_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_: pytest.fail("the page was served"))
    before = signal.getsignal(signal.SIGTERM)
    pid = os.fork()  # the lock is a process's own
    if pid == 0:
        with locked(tmp_path / "outputs" / "app"):
            (tmp_path / "held").touch()
            signal.pause()
    try:
        while not (tmp_path / "held").exists():
            pass
        with pytest.raises(UserError, match="has a page already"):
            module.serve(config)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        signal.signal(signal.SIGTERM, before)


def test_a_port_that_is_taken_is_said_and_the_usual_one_moves_on(config, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot listen there"):
            module._listen(replace(config, port=port))
        monkeypatch.setattr(module, "PORTS", (port, 0))
        with module._listen(replace(config, port=None)) as listening:
            assert listening.getsockname()[1] != port


@pytest.mark.slow
def test_the_page_answers_at_the_address_that_it_prints_and_ends_with_a_word(tmp_path):
    left = tmp_path / "outputs" / "app" / "uploads" / "abc"
    left.mkdir(parents=True)
    server = Server(tmp_path / "outputs", tmp_path / "log")
    server.start()
    try:
        with urllib.request.urlopen(server.address) as answer:
            assert b"gradio_config" in answer.read()
        assert not left.exists()
    finally:
        status = server.end()
    said = (tmp_path / "log").read_text()
    assert said.startswith(f"the page is at {server.address}\n")
    assert said.endswith("the page has ended; runs that it has started go on\n")
    assert status == 0
