"""Train a LipConvnet; a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gsoft
from examples.lipconvnet.network import Convolutions, LipConvnet
from examples.lipconvnet.pictures import Part, Pictures, augmented
from examples.lipconvnet.scores import accuracy
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import whole_file

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Settings:
    """A run: what is trained, and how. The learning rate is a tenth after 1/2, and again after 3/4 of the epochs."""

    convolutions: Convolutions = field(default_factory=Convolutions)
    depth: int = 5
    width: int = 16
    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 0.1
    seed: int = 0


@dataclass
class Run:
    """A training so far: what a checkpoint holds.

    pictures: digest of those that are trained and chosen on. history: for each epoch its mean loss, validation accuracy
    and seconds. best: the weights of the first epoch with the highest validation accuracy, empty before one has ended.
    """

    settings: Settings
    pictures: str
    network: LipConvnet
    optimizer: torch.optim.SGD
    history: list[dict[str, float]]
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best_epoch(self) -> int:
        """Which epoch `best` is of, counted from 0."""
        found = [epoch["validation_accuracy"] for epoch in self.history]
        return found.index(max(found))

    def best_network(self) -> LipConvnet:
        """A network with the weights of `best`, in evaluation mode."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.best)
        return network.eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint, which takes its name when it is whole."""
        content = {
            "settings": self._record(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best": self.best,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save(content, file)

    def _record(self) -> dict[str, Any]:
        groups = self.settings.convolutions.groups
        return {
            **asdict(self.settings),
            "convolutions": {"groups": groups and list(groups), "paired": self.settings.convolutions.paired},
            "pictures": self.pictures,
        }

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises UserError if it cannot be read, or belongs to other settings."""
        try:
            content = torch.load(path, weights_only=True)
            ours, theirs = self._record(), content["settings"]
            other = [name for name in ours if theirs.get(name) != ours[name]]
            if not other:
                self.history, self.best = list(content["history"]), content["best"]
                if self.history:
                    self.network.load_state_dict(self.best)  # whether it fits
                self.network.load_state_dict(content["network"])
                self.optimizer.load_state_dict(content["optimizer"])
        except Exception as error:  # of many kinds: whatever the file holds
            raise UserError(f"{path} is no checkpoint of this program; give another --out") from error
        if other:
            raise UserError(f"{path} was trained with other settings ({', '.join(other)}); give another --out")


def new_run(settings: Settings, pictures: Pictures) -> Run:
    """A run before its first epoch. Raises UserError if the network's settings do not fit each other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = LipConvnet(
            settings.depth,
            settings.width,
            len(pictures.classes),
            settings.convolutions,
            *pictures.mean_and_scale(),
        )
    return Run(settings, pictures.digest(), network, make_optimizer(network, settings.learning_rate), [])


def make_optimizer(network: LipConvnet, learning_rate: float) -> torch.optim.SGD:
    """Stochastic gradient descent as in the paper; learning_rate: the first."""
    return torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def train(
    settings: Settings, pictures: Pictures, checkpoint: Path, progress: Callable[[Run], None] = lambda run: None
) -> Run:
    """Train to the last epoch, from the checkpoint if there is one, which is written after each epoch.

    progress: called after each epoch. Returns the run. Raises UserError if the checkpoint belongs to another run.
    """
    run = new_run(settings, pictures)
    if checkpoint.exists():
        run.restore(checkpoint)
    while len(run.history) < settings.epochs:
        started = time.perf_counter()
        loss = train_epoch(run, pictures.training)
        plain = gsoft.plain_copy(run.network)
        validation_accuracy = accuracy(plain, pictures.validation)
        seconds = time.perf_counter() - started
        run.history.append({"loss": loss, "validation_accuracy": validation_accuracy, "seconds": seconds})
        if run.best_epoch == len(run.history) - 1:
            run.best = copy.deepcopy(run.network.state_dict())
        run.save(checkpoint)
        progress(run)
    return run


def train_epoch(run: Run, part: Part) -> float:
    """One epoch, whose order and crops are decided by the seed and its number; returns the mean loss of its steps."""
    number = len(run.history)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.settings, number)
    generator = torch.Generator().manual_seed(run.settings.seed * 1_000_003 + number)
    run.network.train()
    losses = []
    # A last batch that is not full is left out.
    whole = len(part) // run.settings.batch_size * run.settings.batch_size
    for batch in torch.randperm(len(part), generator=generator)[:whole].split(run.settings.batch_size):
        pictures = augmented(part.pictures[batch], generator).float() / 255
        losses.append(train_step(run.network, run.optimizer, pictures, part.labels[batch]))
    return sum(losses) / len(losses)


def train_step(network: LipConvnet, optimizer: torch.optim.SGD, pictures: Tensor, labels: Tensor) -> float:
    """One step on pictures `(B, 3, 32, 32)` in [0, 1]; returns the loss."""
    loss = F.cross_entropy(network(pictures), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def learning_rate(settings: Settings, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    passed = sum(epoch >= part * settings.epochs for part in (0.5, 0.75))
    return settings.learning_rate / 10**passed
