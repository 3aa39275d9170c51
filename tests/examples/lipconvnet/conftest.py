"""Pictures that take no training to tell apart, and a world whose things are squares of one colour."""

from __future__ import annotations

import pytest
import torch
from tiny_world import write_things

from examples.lipconvnet.pictures import Part, Pictures
from pretraining import world


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
    write_things(tmp_path)
    return tmp_path
