"""The page's server: Gradio's application and the page's own files, behind the gatekeeper."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import webbrowser
from contextlib import suppress
from pathlib import Path

from gsoft_diffusion.app.security import Gatekeeper
from gsoft_diffusion.app.workspace import OWN, Workspace
from gsoft_diffusion.config.app import LOOPBACK, AppConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import locked
from gsoft_diffusion.foundation.text_files import read_text

PORTS = (*range(7860, 7880), 0)  # Gradio's usual one, those beside it, any
SHORTEST = 8  # characters of a password


def serve(config: AppConfig) -> None:
    """Serve the page until a signal ends it. Runs that it has started go on.

    config: the settings. Raises UserError if the address is not to be had, or the folder has a page already.
    """
    workspace = Workspace(Path(config.folder))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by it as by Ctrl-C
    try:
        with locked(workspace.root / OWN), suppress(KeyboardInterrupt):
            _run(config, workspace)
        with suppress(OSError):  # nobody may be listening any more
            print("the page has ended; runs that it has started go on", flush=True)
    except BlockingIOError as error:
        raise UserError(
            f"--folder {config.folder}: has a page already ({error}); choose another, or end that one"
        ) from error


def _run(config: AppConfig, workspace: Workspace) -> None:
    password, listening = _password(config), _listen(config)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    for left in workspace.uploads.iterdir():  # by a page that was killed
        shutil.rmtree(left, ignore_errors=True)
    os.environ |= {
        "GRADIO_TEMP_DIR": str(workspace.uploads),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    import uvicorn

    from gsoft_diffusion.app.application import application
    from gsoft_diffusion.app.jobs import Jobs

    jobs = Jobs(workspace)
    hosts = LOOPBACK if config.host in LOOPBACK else None
    app = Gatekeeper(application(workspace, jobs), hosts, password, str(workspace.uploads))
    # Below "critical" it would print a traceback for each browser that looks on when the page is ended.
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2, ws="none"))
    jobs.start()
    print(f"the page is at {address}", flush=True)
    if config.open_browser:
        threading.Thread(target=_open, args=(address,), daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        jobs.close()


def _password(config: AppConfig) -> str | None:
    """The password, None if the page has none. Raises UserError if it cannot be read, or is short."""
    if not config.password_file:
        return None
    password = next(iter(read_text(config.password_file, "--password_file").splitlines()), "").strip()
    if len(password) < SHORTEST:
        raise UserError(f"--password_file {config.password_file}: its first line needs {SHORTEST} characters or more")
    return password


def _listen(config: AppConfig) -> socket.socket:
    """A socket at the address; with the usual port, the next one that is free. Raises UserError if there is none."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    for port in [config.port] if config.port is not None else PORTS:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((config.host, port))
            listening.listen(128)
            return listening
        except (OSError, OverflowError) as error:
            listening.close()
            why = error
    raise UserError(f"--host {config.host} --port {config.port}: cannot listen there ({why})")


def _open(address: str) -> None:
    with suppress(webbrowser.Error):
        webbrowser.open(address)
