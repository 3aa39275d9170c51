from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gsoft import blocks as module
from gsoft.blocks import (
    REACH,
    cayley,
    exponential,
    free_numbers,
    orthogonal_blocks,
    skew_factor,
    skew_symmetric,
)

MAPS = ["cayley", "exp"]


def random_free(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", [2, 3, 5, 20])
def test_skew_symmetric_has_its_free_numbers_above_the_diagonal(size):
    free = random_free(4, free_numbers(size))
    skew = skew_symmetric(free, size)
    assert torch.equal(skew, -skew.mT)
    above = torch.ones(size, size).triu(1).bool()
    assert torch.equal(skew[:, above], free)


def test_what_is_remembered_of_a_side_serves_training_after_sampling():
    module._REMEMBERED.clear()
    free = random_free(4, free_numbers(9))
    with torch.inference_mode():
        skew_symmetric(free, 9)
    skew_symmetric(free.requires_grad_(), 9).square().sum().backward()
    torch.testing.assert_close(free.grad, 4 * free.detach())  # each number is in the matrix twice


def test_stand_ins_for_tensors_leave_nothing_behind():
    module._REMEMBERED.clear()
    with FakeTensorMode():
        skew_symmetric(torch.empty(4, free_numbers(9)), 9)
    assert not module._REMEMBERED
    assert type(skew_symmetric(random_free(4, free_numbers(9)), 9)) is torch.Tensor


@pytest.mark.parametrize("parametrization", MAPS)
@pytest.mark.parametrize("size", [2, 3, 8, 20, 64, 320])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 10.0, 80.0])
def test_blocks_are_rotations(parametrization, size, norm):
    free = random_free(6, free_numbers(size))
    free *= norm / torch.linalg.matrix_norm(skew_symmetric(free, size), ord=2)[:, None]
    (blocks,) = orthogonal_blocks([free], size, parametrization)
    assert blocks.dtype == torch.float32
    assert (blocks.mT @ blocks - torch.eye(size)).abs().max() < 1e-5
    assert all(torch.linalg.slogdet(block.double()).sign > 0 for block in blocks)  # no reflections


def test_large_blocks_are_rotations_with_many_threads():
    # PyTorch's batched LU is wrong for them: see BATCHED_LU_SIDE.
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        (blocks,) = cayley([3 * random_free(16, free_numbers(160))], 160, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert (blocks.mT @ blocks - torch.eye(160)).abs().max() < 1e-5


# Products up to the reach of each polynomial, LAPACK beyond the last.
@pytest.mark.parametrize("norm", [0.0, 1e-5, *(0.999 * reach**0.5 for reach in REACH.values()), 1.3, 3.0])
@pytest.mark.parametrize("size", [3, 11, 32, 100])
def test_cayley_is_as_exact_as_float32_allows(size, norm):
    free = random_free(300, free_numbers(size))
    free *= norm / torch.linalg.matrix_norm(skew_symmetric(free, size), ord=2)[:, None]
    (made,) = cayley([free], size, torch.float32)
    (exact,) = cayley([free.double()], size, torch.float64)
    assert (made.double() - exact).abs().max() < 16 * torch.finfo(torch.float32).eps


def test_cayley_passes_on_what_is_not_a_number():
    free = torch.zeros(2, free_numbers(32))
    free[1, 0] = torch.nan
    assert cayley([free], 32, torch.float32)[0].isnan().any()


@pytest.mark.parametrize("parametrization", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 12])
def test_zeros_give_exact_identities(parametrization, dtype, size):
    (blocks,) = orthogonal_blocks([torch.zeros(3, free_numbers(size), dtype=dtype)], size, parametrization)
    assert torch.equal(blocks, torch.eye(size, dtype=blocks.dtype).expand(3, size, size))


def test_sign_convention():
    """cayley(K) = (I + K)(I − K)⁻¹ ≈ I + 2K and exponential(K) ≈ I + K."""
    free = random_free(3, free_numbers(5), dtype=torch.float64)
    skew = skew_symmetric(free, 5)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(
        cayley([free], 5, torch.float64)[0], (identity + skew) @ torch.linalg.inv(identity - skew)
    )
    torch.testing.assert_close(cayley([1e-6 * free], 5, torch.float64)[0], identity + 2e-6 * skew, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        exponential([1e-6 * free], 5, torch.float64)[0], identity + 1e-6 * skew, atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("map_", [cayley, exponential])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_gradcheck(map_, factor):
    free = random_free(3, 2, 2, free_numbers(4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda numbers: map_(numbers.unbind(), 4, torch.float64, factor), (free,))


@pytest.mark.parametrize(("parametrization", "turns"), [("scaled_cayley", 1), ("scaled_exp", 2)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("nfactors", "size"), [(1, 2), (2, 5), (3, 40)])
def test_learned_numbers_are_divided_by_those_in_a_row(parametrization, turns, double, nfactors, size):
    free = 0.01 * random_free(nfactors, 2, free_numbers(size))
    wanted = 64 * turns / ((2 if double else 1) * nfactors * (size - 1))
    assert skew_factor(parametrization, size, nfactors, double) == pytest.approx(wanted)
    (found,) = orthogonal_blocks([free], size, parametrization, double=double)
    (plain,) = orthogonal_blocks([wanted * free], size, parametrization.removeprefix("scaled_"))
    torch.testing.assert_close(found, plain, atol=2e-6, rtol=0)
    assert skew_factor(parametrization.removeprefix("scaled_"), size, nfactors, double) == 1


def test_cayley_gradient_is_that_of_a_solve(monkeypatch):
    """Several tensors, more of them than are computed at a time."""
    free = [angle * random_free(90, free_numbers(12)) for angle in (0.01, 0.05, 0.1, 0.3)]
    weight = random_free(4, 90, 12, 12)
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 3 * 90 * 12 * 12)

    def gradient(map_, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in free]
        return torch.stack(torch.autograd.grad((weight.to(dtype) * torch.stack(map_(leaves))).sum(), leaves))

    def solve(leaves):
        skew, identity = skew_symmetric(torch.stack(leaves), 12), torch.eye(12, dtype=torch.float64)
        return torch.linalg.solve(identity - skew, identity + skew, left=False).unbind()

    ours, theirs = (
        gradient(lambda leaves: cayley(leaves, 12, torch.float32), torch.float32),
        gradient(solve, torch.float64),
    )
    assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("parametrization", MAPS)
def test_autocast_and_half_input_do_not_lower_the_precision(parametrization):
    free = random_free(4, free_numbers(16))

    def blocks_and_gradient(autocast):
        numbers = free.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            (blocks,) = orthogonal_blocks([numbers], 16, parametrization)
        blocks.sum().backward()
        return blocks, numbers.grad

    plain, under_autocast = blocks_and_gradient(False), blocks_and_gradient(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))
    (half,) = orthogonal_blocks([free.bfloat16()], 16, parametrization)
    assert half.dtype == torch.float32
    assert (half.mT @ half - torch.eye(16)).abs().max() < 1e-5


def test_no_result_depends_on_what_is_computed_beside_it():
    free = [angle * random_free(5, free_numbers(12)) for angle in (0.01, 0.4, 0.1, 3.0, 0.01)]
    together = cayley(free, 12, torch.float32)
    assert all(
        torch.equal(blocks, cayley([one], 12, torch.float32)[0]) for blocks, one in zip(together, free, strict=True)
    )


@pytest.mark.parametrize("parametrization", MAPS)
@pytest.mark.parametrize("size", [5, 16])
def test_blocks_rounded_to_half_precision_have_gradients_as_exact_as_that(parametrization, size):
    free = 0.1 * random_free(4, free_numbers(size))
    weight = random_free(4, size, size).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        numbers = free.clone().requires_grad_()
        (blocks,) = orthogonal_blocks([numbers], size, parametrization, dtype)
        (blocks * weight).sum().backward()
        results.append((blocks, numbers.grad))
    (rounded, by_rounded), (full, by_full) = results
    assert torch.equal(rounded, full.bfloat16())
    assert by_rounded.dtype == torch.float32
    assert (by_rounded - by_full).abs().max() < 4e-3 * by_full.abs().max()
