"""The one exception that is meant for the person at the keyboard."""

from __future__ import annotations

LONGEST = 1000  # characters of a message


class UserError(Exception):
    """Something the user can put right: the message is one line that names what is wrong, where, and what to do.

    The command-line scripts print it as `error: …` and exit with status 2, without a traceback. Names from files may be
    in it: characters that would steer a terminal are replaced, and what would flood it is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        line = printable(" ".join(message.split()))
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}")


def printable(text: str) -> str:
    """The text without characters that would steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def first_line(error: BaseException) -> str:
    """What a library says of its error, short enough for the message of a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
