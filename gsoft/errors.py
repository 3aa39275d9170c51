"""The library's errors: one line that names the layer or the file, what is wrong, and the valid values."""

from __future__ import annotations

LONGEST = 1000  # characters of a message


def one_line(message: str) -> str:
    """The message as one printable line of bounded length.

    Names from files may be in it: characters that would steer a terminal are replaced, and what would flood it is cut
    in the middle.
    """
    line = printable(" ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def printable(text: str) -> str:
    """The text without characters that would steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


class GSOFTError(ValueError):
    """Something the caller can put right; the message is one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(GSOFTError):
    """A setting, or a combination of them, that cannot be.

    names: the settings. problem: what is wrong with them, without their names.
    """

    def __init__(self, names: tuple[str, ...], problem: str) -> None:
        super().__init__(f"{', '.join(names)}{problem}")
        self.names, self.problem = names, problem


class FileError(GSOFTError):
    """A file that cannot be read or written, or is not a valid adapter."""
