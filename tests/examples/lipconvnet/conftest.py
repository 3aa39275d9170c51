"""Pictures that take no training to tell apart, and a world whose things are squares of one colour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from examples.lipconvnet.pictures import Part, Pictures
from pretraining import world
from pretraining.sprites import CLASSES, HELD_OUT, TOP_HAT, TREES, TUNING


def colour_part(count: int, seed: int) -> Part:
    """Noise that is brighter in one of the three colours, which is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pictures = torch.randint(0, 100, (count, 3, 32, 32), generator=generator)
    pictures[torch.arange(count), labels] += 60
    return Part(pictures.to(torch.uint8), labels)


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    return Pictures(colour_part(48, 0), colour_part(24, 1), colour_part(30, 2), ("red", "green", "blue"))


@pytest.fixture
def things(tmp_path, monkeypatch):
    """The folder of a world whose things are squares, each of a colour of its own; few backgrounds, which take time."""
    monkeypatch.setattr(world, "_VARIANTS", 1)
    assets = tmp_path / "node_modules" / "@lobehub" / "fluent-emoji-3d" / "assets"
    assets.mkdir(parents=True)
    subjects = [code for _, code in (*HELD_OUT.values(), *TUNING.values())]
    codes = [*(code for codes in CLASSES.values() for code in codes), *subjects, *TREES, TOP_HAT]
    for number, code in enumerate(sorted(set(codes))):
        colour = np.random.default_rng(number).integers(0, 256, 3)
        picture = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
        picture.paste((*map(int, colour), 255), (4, 4, 20, 20))
        picture.save(assets / f"{code}.webp", lossless=True)
    return tmp_path
