"""The nearest LoRA to a change, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.publish.approximation import total_error
from gsoft_diffusion.publish.low_rank import LoraLayer, approximate, low_rank


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
@pytest.mark.parametrize("rank", [1, 3, 5, 100])
def test_truncation_loses_the_tail_of_the_singular_values(shape, rank):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(change, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    tail = torch.linalg.svdvals(change.double())[rank:].norm()
    assert math.isclose((change - up @ down).norm(), tail, rel_tol=1e-5, abs_tol=1e-5 * change.norm())


def test_errors_are_relative_to_the_change():
    weight = torch.eye(4)
    layer = approximate("layer", weight, weight + torch.diag(torch.tensor([0.4, 0.3, 0.0, 0.0])), 1, torch.float32)
    assert layer.change == pytest.approx(0.5 / 2)
    assert layer.error == pytest.approx(0.3 / 0.5)
    untouched = approximate("untouched", weight, weight, 1, torch.float32)
    assert (untouched.change, untouched.error) == (0, 0)
    assert total_error([layer, untouched]) == pytest.approx(0.3 / 0.5)
    assert total_error([layer, LoraLayer("other", 1, 1.2, 0, untouched.up, untouched.down)]) == pytest.approx(0.3 / 1.3)


@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_a_lora_is_truncated_as_if_decomposed_anew(rank):
    generator = torch.Generator().manual_seed(0)
    weight, rotated = torch.randn(2, 12, 16, generator=generator)
    found = approximate("layer", weight, rotated, 12, torch.float32).truncated(rank)
    wanted = approximate("layer", weight, rotated, rank, torch.float32)
    torch.testing.assert_close(found.up @ found.down, wanted.up @ wanted.down)
    assert found.error == pytest.approx(wanted.error, abs=1e-6)
    assert (found.change, found.up.shape) == (wanted.change, wanted.up.shape)


def test_factors_that_do_not_fit_are_refused():
    weight = torch.eye(4)
    with pytest.raises(UserError, match="layer does not fit into float16: give --precision bfloat16 or float32"):
        approximate("layer", weight, 1e12 * weight, 2, torch.float16)
