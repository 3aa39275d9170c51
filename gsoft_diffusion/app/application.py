"""The application behind the gatekeeper: Gradio's page, and the page's own files beside it."""

from __future__ import annotations

import threading
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from gsoft_diffusion.app.files import routes
from gsoft_diffusion.app.jobs import Jobs
from gsoft_diffusion.app.page import THEME, build
from gsoft_diffusion.app.steps.common import Page
from gsoft_diffusion.app.subjects import MOST_BYTES
from gsoft_diffusion.app.workspace import Workspace

STYLE = Path(__file__).with_name("style.css")


def application(workspace: Workspace, jobs: Jobs) -> FastAPI:
    """The ASGI application. workspace: the page's folder. jobs: its queue."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(routes(workspace))
    threading.Thread(target=_warm_up, daemon=True).start()
    page = build(Page(workspace, jobs))
    # Only of an application that it has launched itself does Gradio see to it that the files which a browser says it
    # has uploaded are uploads. Of one that is mounted it would take any file of this machine.
    page.has_launched = True
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=THEME,
        css_paths=[STYLE],
        max_file_size=MOST_BYTES,
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        blocked_paths=[str(workspace.subjects), str(workspace.jobs)],
    )


def _warm_up() -> None:
    """Import what thumbnails need, so that the first does not take seconds."""
    import gsoft_diffusion.photos.preview  # noqa: F401
