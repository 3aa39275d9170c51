from __future__ import annotations

import pytest
import torch

from benchmarks import fused
from benchmarks.fused import KINDS, block, count, enough_room, measure, report
from gsoft_diffusion.models.attention_layers import attention_layers


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"WIDTH": 128, "HEADS": 4, "TOKENS": 96, "FEW_TOKENS": 3, "REPETITIONS": 1}.items():
        monkeypatch.setattr(fused, name, value)


@torch.no_grad()
def test_both_compute_the_same():
    whole, _ = block("slices", False)
    taken, _ = block("separate", False)
    for name, layer in attention_layers(whole).items():
        getattr(taken.separate, name).weight.copy_(layer.weight)
    taken.separate.inward.weight.copy_(whole.to_qkv_mlp_proj.weight[3 * 128 :])
    taken.separate.outward.weight.copy_(whole.to_out.weight[:, 128:])
    x = torch.randn(1, 5, 128)
    torch.testing.assert_close(taken(x), whole(x))


@pytest.mark.parametrize("room", [True, False])
def test_slices_cost_no_more_kernels_than_layers_and_never_wait(room):
    with enough_room(room):
        found = {kind: count(kind, True) for kind in KINDS}
    assert found["slices"]["kernels"] <= found["separate"]["kernels"]
    assert found["slices"]["waits"] == 0


def test_the_report_has_a_row_for_each():
    records = [
        {"kind": kind, "adapted": True, "room": True, **count(kind, True), "seconds": measure(kind, True)}
        for kind in KINDS
    ]
    lines = report(records).splitlines()
    assert lines[0] == "| one block | kernels | waits | kept | processor |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {kind}, rotated weights" for kind in KINDS.values()]
