from __future__ import annotations

import sys

import pytest
import torch

import gsoft
from examples.lipconvnet import scores
from examples.lipconvnet.network import Convolutions, LipConvnet
from examples.lipconvnet.pictures import Part
from examples.lipconvnet.scores import EPSILON, accuracy, attack, score
from gsoft_diffusion.foundation.errors import UserError

foolbox = pytest.importorskip("foolbox", reason="of the extra lipconvnet")


def logit_by_brightness(threshold: float) -> torch.nn.Module:
    """Class 1 if the first pixel's red is above the threshold; 1-Lipschitz, and its certificate is exact."""

    class Brightness(torch.nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            over = (pictures[:, 0, 0, 0] - threshold) / 2**0.5
            return torch.stack([-over, over], 1)

    return Brightness().eval()


@pytest.mark.parametrize("steps", [5, 20, 40])
def test_the_attack_finds_what_there_is_to_find_and_nothing_else(steps):
    values = torch.tensor([0.5 - 1.2 * EPSILON, 0.5 - 0.8 * EPSILON, 0.5 + 0.8 * EPSILON, 0.5 + 1.2 * EPSILON])
    pictures = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    pictures[:, 0, 0, 0] = (values * 255).round().to(torch.uint8)
    part = Part(pictures, torch.tensor([0, 0, 1, 1]))
    network = logit_by_brightness(0.5)
    assert attack(network, part, steps).tolist() == [True, False, False, True]
    logits = network(pictures.float() / 255)
    assert (gsoft.certified_radius(logits) >= EPSILON).tolist() == [True, False, False, True]


def test_what_is_certified_withstands_the_attack(pictures):
    torch.manual_seed(0)
    network = LipConvnet(5, 8, 3, Convolutions((4, None)), *pictures.mean_and_scale()).eval()
    found = score(network, pictures.test, attacked=12, steps=10)
    assert found.attacked == 12
    assert found.beaten == 0
    assert 0 <= found.attacked_certified <= found.attacked_accuracy <= 1
    assert found.certified <= found.accuracy == accuracy(network, pictures.test)


def test_a_certificate_that_does_not_hold_is_counted(pictures, monkeypatch):
    """Were the bound wrong, the attack would beat the certificate, and the record would say so."""
    torch.manual_seed(0)
    network = LipConvnet(5, 8, 3, Convolutions((4, None)), *pictures.mean_and_scale()).eval()
    labels = network(pictures.test.pictures.float() / 255).argmax(1)
    part = Part(pictures.test.pictures, labels.detach())
    monkeypatch.setattr(scores, "EPSILON", 30.0)
    monkeypatch.setattr(gsoft, "lipschitz_bound", lambda network: 1e-6)
    found = score(network, part, attacked=30, steps=10)
    assert found.attacked_certified == 1
    assert found.beaten > 0


def test_nothing_is_attacked_without_foolbox_only_if_nothing_is_to_be(pictures, monkeypatch):
    torch.manual_seed(0)
    network = LipConvnet(5, 8, 3, Convolutions(), *pictures.mean_and_scale()).eval()
    monkeypatch.setitem(sys.modules, "foolbox", None)
    found = score(network, pictures.test, attacked=0, steps=1)
    assert (found.attacked, found.beaten, found.attacked_accuracy, found.attacked_certified) == (0, 0, None, None)
    with pytest.raises(UserError, match=r'^the attack needs foolbox .*pip install "\.\[lipconvnet\]"'):
        score(network, pictures.test, attacked=3, steps=1)
