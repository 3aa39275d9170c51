"""Labelled colour pictures of 32 px: this repository's world with held-out things, or CIFAR-100."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.lipconvnet.network import PICTURE_SIZE
from gsoft_diffusion.foundation.errors import UserError
from pretraining.sprites import ANIMALS, Sprite
from pretraining.world import BACKGROUNDS, COLORS, SIZE, World

FEWEST_THINGS = 4  # of a class: two for training, one for each other part
VALIDATION_OF_CIFAR = 5000  # of its 50,000 training pictures


@dataclass(frozen=True)
class Part:
    """Some labelled pictures: `pictures` uint8 `(N, 3, 32, 32)`, `labels` int64 `(N,)`."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Pictures:
    """What a network is trained on, what its epoch is chosen on, and what it is scored on.

    familiar: further pictures of the things that training shows; None where there is no such part.
    """

    training: Part
    validation: Part
    test: Part
    classes: tuple[str, ...]
    familiar: Part | None = None

    def digest(self) -> str:
        """SHA-256 of the pictures and labels of training and validation."""
        digest = hashlib.sha256()
        for part in (self.training, self.validation):
            for tensor in (part.pictures, part.labels):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """The mean of each colour `(3,)`, and the spread of all of them, one number, in [0, 1] and of training."""
        pixels = self.training.pictures.float() / 255
        mean = pixels.mean((0, 2, 3))
        return mean, (pixels - mean[:, None, None]).square().mean().sqrt()


def deal_out(things: list[Sprite], rng: np.random.Generator) -> tuple[list[Sprite], list[Sprite], list[Sprite]]:
    """A class's things for training, validation and test: a fourth for each of the last two, one or more."""
    order = [things[i] for i in rng.permutation(len(things))]
    held = max(1, len(things) // 4)
    return order[2 * held :], order[held : 2 * held], order[:held]


def world_pictures(folder: Path, seed: int, training: int, held_out: int) -> Pictures:
    """Scenes of the miniature world. Those for the test show things that no training picture shows.

    Those for validation show other such things in one half, and things of training in the other: few things alone
    would make the choice of an epoch a lottery.

    folder: where npm installed the pictures of things. seed: deals each class's things out to the parts, and draws.
    training, held_out: how many scenes for training, and for each other part; classes come equally often. Classes are
    those with four things or more. Raises UserError if the folder does not have the things.
    """
    try:
        world = World(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"--folder: {error}; run: npm install --prefix {folder} @lobehub/fluent-emoji-3d@1.1.0"
        ) from None
    rng = np.random.default_rng(seed)
    others = [*world.held_out.values(), *world.tuning.values()]
    known = {word: [*things, *(s for w, s in others if w == word)] for word, things in world.classes.items()}
    classes = {word: things for word, things in known.items() if len(things) >= FEWEST_THINGS}
    dealt = {word: deal_out(things, rng) for word, things in classes.items()}

    def draw(part: int, count: int) -> Part:
        return _draw(world, [(word, parts[part]) for word, parts in dealt.items()], count, rng)

    new, known_ones = draw(1, held_out // 2), draw(0, held_out - held_out // 2)
    validation = Part(torch.cat([new.pictures, known_ones.pictures]), torch.cat([new.labels, known_ones.labels]))
    return Pictures(draw(0, training), validation, draw(2, held_out), tuple(classes), draw(0, held_out))


def _draw(world: World, things: list[tuple[str, list[Sprite]]], count: int, rng: np.random.Generator) -> Part:
    """Scenes at random as `World.sample` makes them, at half the size; labels 0, 1, 2 … by turns."""
    pictures = np.empty((count, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    labels = np.arange(count) % len(things)
    for picture, label in zip(pictures, labels, strict=True):
        word, sprites = things[label]
        places = list(COLORS) if rng.random() < 0.15 else list(BACKGROUNDS)
        scene = world.draw(
            rng,
            sprites[rng.integers(len(sprites))],
            places[rng.integers(len(places))],
            color=list(COLORS)[rng.integers(len(COLORS))] if rng.random() < 0.12 else None,
            hat=word in ANIMALS and rng.random() < 0.08,
        )
        factor = SIZE // PICTURE_SIZE
        blocks = scene.reshape(PICTURE_SIZE, factor, PICTURE_SIZE, factor, 3)
        picture[:] = np.rint(blocks.mean((1, 3)))
    return Part(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def cifar_pictures(folder: Path, seed: int) -> Pictures:
    """CIFAR-100, read by torchvision, which downloads it into the folder if it is not there.

    seed: chooses 5,000 of its training pictures for validation. Raises UserError without torchvision or the data.
    """
    try:
        from torchvision.datasets import CIFAR100
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another PyTorch
        raise UserError(f"--data cifar100 needs torchvision, which cannot be imported here: {error}") from None
    try:
        training, test = (CIFAR100(folder, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data cifar100: is not available in {folder}: {error}") from None
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(training.data)))
    whole, tested = (
        Part(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (training, test)
    )
    validation, rest = order[:VALIDATION_OF_CIFAR], order[VALIDATION_OF_CIFAR:]
    return Pictures(
        Part(whole.pictures[rest], whole.labels[rest]),
        Part(whole.pictures[validation], whole.labels[validation]),
        tested,
        tuple(training.classes),
    )


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Crops at random from pictures with 4 px of zeros around, half of them mirrored.

    pictures: `(B, 3, H, W)`, as the result. generator: of the random numbers.
    """
    count, _, height, width = pictures.shape
    top, left = torch.randint(0, 9, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)  # (B, H)
    columns = torch.arange(width).expand(count, -1)
    columns = left + torch.where(mirrored, columns.flip(1), columns)  # (B, W)
    padded = F.pad(pictures, (4, 4, 4, 4))
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
