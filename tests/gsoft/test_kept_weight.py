"""The exact weight of a layer that has another in its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.pretended_gpu import PretendedGPU, bytes_in_use
from gsoft.kept_weight import KeptWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_no_memory_of_the_gpu_and_comes_back_bit_for_bit(dtype):
    layer = nn.Linear(64, 32).to(dtype)
    expected = layer.weight.detach().clone()
    with PretendedGPU():
        layer.to("cuda")
        other = torch.zeros(32, 64, device="cuda")
        in_use, kept = bytes_in_use(), KeptWeight()
        kept.replace(layer, other)
        assert kept.replaced
        assert bytes_in_use() == in_use
        assert not layer.weight.cpu().any()
        kept.restore(layer)
        assert not kept.replaced
        assert torch.equal(layer.weight.cpu(), expected)
