"""All settings of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from gsoft_diffusion.config.settings import Mark, Rule, Settings, check_rules, settle_paths
from gsoft_diffusion.foundation.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT = Rule(lambda port: 0 <= port < 2**16, "from 0 to 65535")


@dataclass(frozen=True)
class AppConfig(Settings):
    """All settings of the page.

    folder: folder with the runs, in which photos and the queue are kept as well; of what is outside of it, the page
      reads only the base models that are named on it.
    host: address to listen at; by default only this machine can reach the page. Any other needs a password.
    port: port to listen at; by default 7860, or the next that is free.
    password_file: file whose first line is the password that opens the page; nobody else should be able to read it.
    open_browser: open the page in this machine's browser.
    """

    folder: Annotated[str, Mark.PATH] = "outputs"
    host: str = "127.0.0.1"
    port: Annotated[int | None, PORT] = None
    password_file: Annotated[str | None, Mark.PATH] = None
    open_browser: bool = True

    def __post_init__(self) -> None:
        check_rules(self)
        settle_paths(self)
        if not self.password_file and self.host not in LOOPBACK:
            raise UserError(
                f"--host {self.host}: others can reach the page there, so it needs a password; give --password_file"
            )
