from __future__ import annotations

import pytest
import torch

from gsoft import costs
from gsoft.costs import device_costs, weight_side_is_cheaper, weights_at_once


class OnDevice:
    """Stands in for a weight on a device that need not be there."""

    def __init__(self, out_features: int, in_features: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.device, self._dtype = torch.Size((out_features, in_features)), torch.device(device), dtype

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self._dtype.itemsize


@pytest.mark.parametrize(
    ("tokens", "width", "weight_side"), [(4096, 320, True), (256, 1280, False), (77, 320, False), (1024, 96, True)]
)
def test_the_cheaper_side_on_a_cpu(tokens, width, weight_side):
    """Stable Diffusion 1.5 at 64×64 latents, and the miniature: the weight where tokens far outnumber features."""
    weight = OnDevice(width, width, "cpu")
    assert weight_side_is_cheaper(tokens, weight, weights_at_once(weight)) == weight_side


@pytest.mark.parametrize(("tokens", "width"), [(4096, 320), (256, 1280), (64, 1280), (77, 640), (4 * 4096, 640)])
def test_on_a_gpu_launches_decide_for_the_weights_of_stable_diffusion(tokens, width):
    weight = OnDevice(width, width, "cuda")
    assert weight_side_is_cheaper(tokens, weight, weights_at_once(weight))


def test_on_a_gpu_few_tokens_of_a_wide_layer_are_rotated():
    weight = OnDevice(6144, 6144, "cuda")
    assert not weight_side_is_cheaper(256, weight, weights_at_once(weight))


def test_weights_that_share_a_call_share_its_launches():
    weight = OnDevice(96, 96, "cpu")
    alone, together = (weight_side_is_cheaper(100, weight, count) for count in (1, 28))
    assert (alone, together) == (False, True)


def test_a_gpu_rotates_many_weights_at_once_and_a_cpu_few():
    assert weights_at_once(OnDevice(1280, 1280, "cuda")) == costs.GPU.entries_at_once // 1280**2 > 1
    assert weights_at_once(OnDevice(1280, 1280, "cpu")) == 1
    assert device_costs(torch.device("meta")) == costs.GPU
