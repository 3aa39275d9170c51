from __future__ import annotations

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from benchmarks.frozen_storage import DRIFT, WAYS, bytes_in_four_bits, drift, held, report, rounding, weights


def tiny() -> ZImageTransformer2DModel:
    model = ZImageTransformer2DModel(
        dim=96, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[16, 16, 16]
    )
    return nn.Module.to(model, torch.bfloat16).requires_grad_(False)


def test_what_each_way_holds():
    """Without recomputed activations autograd keeps what diffusers' hooks cast, and nothing of ours."""
    found = {(way, again): held(way, again, tiny) for way in WAYS for again in (False, True)}
    plain = found["plain", False]
    for way in ("float8", "offload", "both"):
        assert found[way, False]["weights"] < plain["weights"]
        assert found[way, False]["kept"] == plain["kept"]
    assert found["casting", False]["weights"] <= found["float8", False]["weights"]  # it rounds biases, too
    gained = plain["weights"] - found["casting", False]["weights"]
    assert found["casting", False]["kept"] - plain["kept"] > gained
    assert all(found[way, True]["kept"] < found[way, False]["kept"] for way in WAYS)


@pytest.mark.parametrize("way", ["float8", "casting"])
def test_predictions_move_a_little(way, base):
    assert 0 < drift(way, str(base), samples=2)["prediction"] < 0.2


def test_a_scale_keeps_the_digits_of_small_weights():
    assert rounding(0.02)["scaled"] == pytest.approx(rounding(0.001)["scaled"], rel=0.05)
    assert rounding(0.001)["plain"] > 5 * rounding(0.001)["scaled"]


def test_four_bits_have_scales_and_these_have_scales():
    """One of eight bits for 64 numbers, and one of 32 bits for 256 of those (Dettmers et al., 2023, §3)."""
    assert bytes_in_four_bits(1024) == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256))


def test_the_report_has_every_row():
    result = {
        "weights": [{"model": "Stable Diffusion 1.5", **weights("Stable Diffusion 1.5")}],
        "bytes_in_four_bits": bytes_in_four_bits(64),
        "held": [{"way": way, "checkpointing": False, "weights": 2**20, "kept": 2**21} for way in WAYS],
        "drift": [{"way": way, "prediction": 0.01} for way in DRIFT],
        "rounding": [rounding(0.02)],
    }
    lines = report(result)
    assert "| Stable Diffusion 1.5 | 1.7 | 1.5 | 1.5 | 1.5 | 1.4 |" in lines
    assert all(title in lines for title, _ in (*WAYS.values(), *DRIFT.values()))
