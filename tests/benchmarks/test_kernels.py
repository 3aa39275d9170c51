from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import kernels
from benchmarks.kernels import Case, count, report, unet_inputs
from benchmarks.pretended_gpu import PretendedGPU, bytes_in_use


@pytest.fixture
def case(monkeypatch):
    """A UNet of the tests' size, whose kernels are counted like the real ones'."""
    from tiny_models import tiny_unet

    tiny = Case("tiny", lambda: tiny_unet(block_out_channels=(64, 64), norm_num_groups=8), unet_inputs(24), 8)
    monkeypatch.setitem(kernels.CASES, "tiny", tiny)
    return tiny


def test_our_step_starts_fewer_kernels_than_loras_and_never_waits(case):
    found = {method: count(case, method) for method in ("floor", "lora", "double_gsoft")}
    kernels_of = {method: record["kernels"] for method, record in found.items()}
    assert kernels_of["floor"] < kernels_of["double_gsoft"] < kernels_of["lora"]
    assert found["double_gsoft"]["waits"] == 0
    assert all(record["kernels"] == sum(record["by_operation"].values()) for record in found.values())
    lines = report([{"case": "tiny", "method": method, **record} for method, record in found.items()])
    assert f"{kernels_of['lora']:,} (1.00)" in lines


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_library_never_waits_in_a_step_on_either_side(case, checkpointing, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr("gsoft.adapter.KEPT_WEIGHT_BYTES", 0)  # so that activations are rotated
    assert count(replace(case, checkpointing=checkpointing), "double_gsoft")["waits"] == 0


def test_nothing_is_computed_and_memory_is_counted_where_only_shapes_are_held():
    with PretendedGPU(numbers=False) as gpu:
        before = bytes_in_use()
        linear = nn.Linear(1000, 1000, device="cuda")
        x = torch.ones(2, 1000, device="cuda")
        assert bytes_in_use() - before == 4 * (1000 * 1000 + 1000 + 2 * 1000)
        gpu.reset()
        y = linear(x)
        assert gpu.kernels == {"addmm": 1}
        y.sum().backward()
        assert linear.weight.grad is not None
        assert linear.weight.grad.device == x.device
        assert y.sum().item() == 1  # there is no number
        assert gpu.waits.total() == 1
        del x, y, linear
    assert bytes_in_use() == before


def test_attention_is_one_operation_each_way():
    with PretendedGPU(numbers=False) as gpu:
        query, key, value = (torch.ones(1, 2, 8, 4, device="cuda", requires_grad=True) for _ in range(3))
        gpu.reset()
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        attended.backward(torch.ones(1, 2, 8, 4, device="cuda"))
        assert {name: n for name, n in gpu.kernels.items() if "attention" in name} == {
            "scaled_dot_product_attention": 1,
            "scaled_dot_product_attention_backward": 1,
        }
        assert query.grad is not None
        assert query.grad.shape == query.shape
