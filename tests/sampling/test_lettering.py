"""Letters that the machine's fonts have, on contact sheets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gsoft_diffusion.sampling import lettering
from gsoft_diffusion.sampling.lettering import _characters, _font_for, text_lines


def has_ink(text: str) -> np.ndarray:
    """Which points of a strip are dark that the text is drawn on."""
    strip = Image.new("L", (200, 20), "white")
    ((line, font),) = text_lines(text, 200)
    ImageDraw.Draw(strip).text((0, 0), line, fill="black", font=font)
    return np.asarray(strip) < 128


@pytest.mark.parametrize("text", ["собака", "σκύλος", "chien à l'été", "dog × 0.5 …", "כלב"])
def test_other_letters_are_no_boxes(text, caplog):
    """As a box is always the same, letters that differ are drawn as such; and nothing is said."""
    boxes = has_ink("\ue000" * len(text))
    assert has_ink(text).any()
    assert not np.array_equal(has_ink(text), boxes)
    assert _characters(_font_for(text)).issuperset(ord(letter) for letter in text if letter != " ")
    assert "no font" not in "".join(record.getMessage() for record in caplog.records if text in record.getMessage())


def test_letters_that_no_font_has_are_said(caplog, monkeypatch):
    monkeypatch.setattr(lettering, "_system_fonts", list)
    has_ink("a photo of 犬")
    assert "no font on this machine has 犬: contact sheets show boxes instead" in caplog.text


def test_plain_letters_need_no_other_font():
    assert _font_for("a sks dog: 7 * 8 ~ {0}") is None
