"""The exception for mistakes that the user can correct."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gsoft.errors import LONGEST, GSOFTError, one_line, printable

__all__ = ["LONGEST", "DivergedError", "UserError", "first_line", "printable", "user_errors"]


class UserError(Exception):
    """Something the user can put right: the message is one line that names what is wrong, where, and what to do.

    The command-line scripts print it as `error: …` and exit with status 2, without a traceback. Names from files may be
    in it: characters that would steer a terminal are replaced, and what would flood it is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class DivergedError(UserError):
    """A training whose loss or gradient is not finite."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Inside the block, or in the function that it decorates, errors of the library gsoft become UserErrors."""
    try:
        yield
    except GSOFTError as error:
        raise UserError(str(error)) from error


def first_line(error: BaseException) -> str:
    """What a library says of its error, short enough for the message of a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
