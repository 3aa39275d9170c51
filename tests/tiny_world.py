"""The miniature world's things as squares of one colour each, for tests that have not its pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pretraining.sprites import CLASSES, HELD_OUT, TOP_HAT, TREES, TUNING


def write_things(folder: Path) -> None:
    """Put a square of a colour of its own for everything that `World` reads where npm would put its picture."""
    assets = folder / "node_modules" / "@lobehub" / "fluent-emoji-3d" / "assets"
    assets.mkdir(parents=True)
    subjects = [code for _, code in (*HELD_OUT.values(), *TUNING.values())]
    codes = [*(code for codes in CLASSES.values() for code in codes), *subjects, *TREES, TOP_HAT]
    for number, code in enumerate(sorted(set(codes))):
        colour = np.random.default_rng(number).integers(0, 256, 3)
        picture = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
        picture.paste((*map(int, colour), 255), (4, 4, 20, 20))
        picture.save(assets / f"{code}.webp", lossless=True)
