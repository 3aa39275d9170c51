"""Texts for pictures: cut into lines, each with a font of this machine that has its letters."""

from __future__ import annotations

import logging
from functools import cache
from io import BytesIO
from typing import Any

from PIL import ImageFont

logger = logging.getLogger(__name__)

FONT_SIZE = 14
LINE = FONT_SIZE + 6  # pixels from one line to the next


def text_lines(text: str, width: int) -> list[tuple[str, Any]]:
    """`text` in at most three lines, each with the font to draw it in; the rest is cut with an ellipsis.

    width: pixels that a line may take.
    """
    font = _font(_font_for(text))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > 3:
        lines = [*lines[:2], lines[2] + "…"]
    return [(_cut(line, font, width), font) for line in lines]


def _cut(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


@cache
def _font_for(text: str) -> str | None:
    """The file of a font that has the text's characters: None for Pillow's own, or the first of this machine's.

    If none has all, the one that lacks fewest, which is said: boxes will stand for the rest.
    """
    if text.isascii():
        return None
    wanted = {ord(character) for character in text if character.isprintable() and not character.isspace()}
    font: str | None = None
    missing = wanted - _characters(font)
    for path in _system_fonts() if missing else ():
        lacks = wanted - _characters(path)
        if len(lacks) < len(missing):
            missing, font = lacks, path
        if not missing:
            break
    if missing:
        shown = "".join(map(chr, sorted(missing)[:10]))
        logger.warning(
            "no font on this machine has %s: contact sheets show boxes instead; install one, such as Noto Sans", shown
        )
    return font


@cache
def _font(path: str | None) -> Any:
    return ImageFont.truetype(path, FONT_SIZE) if path else ImageFont.load_default(FONT_SIZE)


@cache
def _system_fonts() -> list[str]:
    """Upright sans-serif fonts first; matplotlib brings DejaVu Sans, which has Greek, Cyrillic, Hebrew and Arabic."""
    from matplotlib import font_manager  # takes a while, and Latin letters need none of it

    def rank(font: font_manager.FontEntry) -> tuple[bool, bool, bool, str]:
        return "Sans" not in font.name, font.style != "normal", font.weight not in (400, "normal"), font.fname

    fonts = [
        font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name
    ]  # it has boxes for all
    return [font.fname for font in sorted(fonts, key=rank)]


@cache
def _characters(path: str | None) -> frozenset[int]:
    """The code points that a font has, Pillow's own if no path is given; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path or BytesIO(_font(None).font_bytes)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
