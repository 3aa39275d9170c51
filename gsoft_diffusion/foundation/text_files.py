"""Text files as people's tools write them, and names as their systems spell them: one way to read both."""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from gsoft_diffusion.foundation.errors import UserError, first_line

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: str | Path, name: str | None = None) -> str:
    r"""The text of a file in UTF-8, or in UTF-16 if its byte-order mark says so: without marks, lines end in "\n".

    Files that were joined have marks in the middle as well.

    name: what messages call the file, by default its path. Raises UserError if it cannot be read or is no text.
    """
    try:
        content = on_disk(Path(path)).read_bytes()
        encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except OSError as error:
        raise UserError(f"{name or path}: cannot be read as text ({first_line(error)})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name or path}: cannot be read as text ({error.reason}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{name or path}: cannot be read as text (it holds zero bytes); save it as UTF-8")
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def read_prompts(path: str | Path, name: str | None = None) -> list[str]:
    """The prompts in a file, one a line; blank lines and those that start with # are none.

    path, name: as in `read_text`, and so are the UserErrors.
    """
    lines = [line.strip() for line in composed(read_text(path, name)).split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


def read_csv(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table with commas, whose first line names the columns, each with the number of its last line.

    Cells that a row does not have are not in it. Raises as `read_text`, and UserError for what is no such table.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    try:
        for row in reader:
            if any(row.get(None, ())):  # what is beyond the named columns
                raise UserError(
                    f"{path}, line {reader.line_num}: has more cells than the first line has names; put a text with "
                    'commas between quotes: "a dog, asleep"'
                )
            yield reader.line_num, {name: cell for name, cell in row.items() if name is not None and cell is not None}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: cannot be read as a table ({error})") from error


def composed(text: str) -> str:
    """The text in Unicode's normal form C, in which equal texts are equal: é is one character and not two."""
    return unicodedata.normalize("NFC", text)


def on_disk(path: Path) -> Path:
    """The path as it is spelt on disk, as far as it is there, where folders know it in another Unicode normal form."""
    try:
        if path.exists():
            return path
        found = Path(path.anchor)
        for part in path.relative_to(path.anchor).parts:
            if found.is_dir() and not (found / part).exists():
                same = [entry.name for entry in found.iterdir() if composed(entry.name) == composed(part)]
                part = same[0] if len(same) == 1 else part  # of two it could be either
            found /= part
        return found
    except (OSError, ValueError):  # not readable, or no path at all
        return path
