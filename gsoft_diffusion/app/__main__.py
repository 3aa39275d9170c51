"""gsoft-app: `python -m gsoft_diffusion.app`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NoReturn

from gsoft_diffusion.config.app import AppConfig
from gsoft_diffusion.config.command_line import parse, run
from gsoft_diffusion.foundation.errors import UserError


def main() -> NoReturn:
    """Serve the page as the command line says, and leave the program: 0 when it is ended, 2 on bad input."""
    run(_main)


def _main() -> int:
    config = parse(
        AppConfig,
        "A page in the browser: drop photos, watch them being learned, draw, take the result home.\n\ngsoft-app",
    )
    if find_spec("gradio") is None:
        raise UserError('the page needs Gradio; install it with: pip install "gsoft-diffusion[app]"')
    from gsoft_diffusion.app.server import serve

    serve(config)
    return 0


if __name__ == "__main__":
    main()
