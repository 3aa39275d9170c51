"""How far apart models are, as their fingerprints tell it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.pretended_gpu import PretendedGPU
from gsoft.fingerprint import difference, distance, fingerprint


def matrices(seed: int) -> list[Tensor]:
    """Matrices of different shapes and sizes, as of a model."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(16 + 8 * (number % 5), 24 + 8 * (number % 3), generator=generator) * 10.0 ** (number % 4 - 2)
        for number in range(64)
    ]


def moved(weights: list[Tensor], far: float, seed: int, rank: int | None) -> list[Tensor]:
    """The weights with a random change of this relative size, of low rank if one is given."""
    result = []
    for weight, other in zip(weights, matrices(seed), strict=True):
        change = other if rank is None else other[:, :rank] @ other[:rank]
        result.append(weight + change * far * weight.norm() / change.norm())
    return result


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("far", [0.02, 0.1, 0.4])
def test_the_distance_is_told_to_about_a_fifth(far, rank):
    """Three standard errors; on average over ten models nearer."""
    weights = matrices(0)
    base = fingerprint("x", weights)
    found = [distance(base, fingerprint("x", moved(weights, far, seed, rank))) for seed in range(1, 11)]
    assert all(0.4 * far < one < 1.6 * far for one in found)
    assert sum(found) / 10 == pytest.approx(far, rel=0.2)


def test_unrelated_weights_are_about_the_root_of_two_apart():
    found = [distance(fingerprint("x", matrices(0)), fingerprint("x", matrices(seed))) for seed in range(1, 11)]
    assert sum(found) / 10 == pytest.approx(2**0.5, rel=0.2)


def test_the_same_weights_are_not_apart():
    base = fingerprint("x", matrices(0))
    assert distance(base, base) == 0
    rounded = fingerprint("x", [weight.bfloat16() for weight in matrices(0)])
    assert difference(base, rounded) is None
    assert distance(base, rounded) < 0.005
    assert distance(fingerprint("x", []), fingerprint("x", [])) == 0


def test_a_gpus_weights_stay_there():
    weights = matrices(0)[:3]
    with PretendedGPU() as gpu:
        there = [weight.to("cuda") for weight in weights]
        gpu.reset()
        found = fingerprint("x", there)
        assert gpu.kernels["linalg_vector_norm"] == 16
    assert difference(found, fingerprint("x", weights)) is None
    assert distance(found, fingerprint("x", weights)) < 1e-3


def test_a_model_of_one_layer_has_as_many_numbers():
    """One alone is the same for one unrelated model in 150."""
    prints = [fingerprint("x", [torch.randn(24, 32, generator=torch.Generator().manual_seed(s))]) for s in range(100)]
    assert all(difference(one, other) for place, one in enumerate(prints) for other in prints[:place])
    assert distance(prints[0], prints[1]) == pytest.approx(2**0.5, rel=0.6)


def test_an_earlier_file_has_fewer_numbers_and_a_model_without_contents_none():
    whole = fingerprint("x", matrices(0)[:1])
    earlier = ":".join(whole.split(":")[:2])
    assert difference(earlier, whole) is None
    assert difference(earlier, fingerprint("x", matrices(1)[:1])) == "other weights"
    assert difference(whole, fingerprint("x", [])) is None
