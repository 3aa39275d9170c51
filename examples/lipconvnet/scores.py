"""Accuracy of a network, certified and under attack."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

import gsoft
from examples.lipconvnet.network import LipConvnet
from examples.lipconvnet.pictures import Part
from gsoft_diffusion.foundation.errors import UserError

EPSILON = 36 / 255  # the Euclidean distance at which robustness is reported, of pictures in [0, 1]
PATH = 2.5  # of EPSILON: length of an attack's path
AT_ONCE = 500  # pictures


@dataclass(frozen=True)
class Scores:
    """Shares of test pictures, in [0, 1].

    accuracy: rightly named. certified: so, and nothing within `EPSILON` is named otherwise, by the certificate.
    attacked_accuracy: rightly named before and after the attack, of the attacked pictures. attacked_certified: the
    certified share of these, which cannot be larger; both None if none were attacked. attacked: how many were attacked.
    beaten: how many certified pictures the attack had named otherwise, which has to be 0.
    """

    accuracy: float
    certified: float
    attacked_accuracy: float | None
    attacked_certified: float | None
    attacked: int
    beaten: int


def accuracy(network: nn.Module, part: Part) -> float:
    """The share of pictures that the network names rightly, in its present mode."""
    return _share(_logits(network, part.pictures).argmax(1) == part.labels)


def score(network: LipConvnet, part: Part, attacked: int, steps: int) -> Scores:
    """How a network does.

    network: what is scored, in evaluation mode. part: the pictures. attacked: how many of them, from the first, are
    attacked by projected gradient descent in `steps` steps; 0 for none. Raises UserError if there is no foolbox.
    """
    plain = gsoft.plain_copy(network)
    logits = _logits(plain, part.pictures)
    right = logits.argmax(1) == part.labels
    radius = gsoft.certified_radius(logits, gsoft.lipschitz_bound(network))
    certified = right & (radius >= EPSILON)
    few = Part(part.pictures[:attacked], part.labels[:attacked])
    withstood = right[:attacked] & attack(plain, few, steps)
    return Scores(
        accuracy=_share(right),
        certified=_share(certified),
        attacked_accuracy=_share(withstood) if len(few) else None,
        attacked_certified=_share(certified[:attacked]) if len(few) else None,
        attacked=len(few),
        beaten=int((certified[:attacked] & ~withstood).sum()),
    )


def attack(network: nn.Module, part: Part, steps: int) -> Tensor:
    """Attack pictures by foolbox's projected gradient descent within `EPSILON`.

    network: pictures in [0, 1] to logits. part: what is attacked. steps: of the descent, from a point at random.
    Returns which pictures are named rightly nevertheless, `(N,)`, bool. Raises UserError if there is no foolbox.
    """
    if not len(part):
        return torch.empty(0, dtype=torch.bool)
    foolbox = _foolbox()
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    # By Madry et al. (arXiv 1706.06083) the path is longer than the radius, in however many steps.
    descent = foolbox.attacks.L2ProjectedGradientDescentAttack(rel_stepsize=PATH / steps, steps=steps)
    withstood = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for pictures, labels in zip(part.pictures.split(AT_ONCE), part.labels.split(AT_ONCE), strict=True):
            _, _, success = descent(model, pictures.float() / 255, labels, epsilons=EPSILON)
            withstood.append(~success)
    return torch.cat(withstood)


def check_attack(attacked: int) -> None:
    """Raise UserError if pictures are to be attacked and there is no foolbox: before a training, not after it."""
    if attacked:
        _foolbox()


def _foolbox() -> ModuleType:
    try:
        import foolbox
    except ImportError as error:
        raise UserError(
            f'the attack needs foolbox ({error}); run: pip install ".[lipconvnet]", or leave it out by --attacked 0'
        ) from None
    return foolbox


@torch.no_grad()
def _logits(network: nn.Module, pictures: Tensor) -> Tensor:
    return torch.cat([network(some.float() / 255) for some in pictures.split(AT_ONCE)])


def _share(which: Tensor) -> float:
    return float(which.double().mean()) if len(which) else 0.0
