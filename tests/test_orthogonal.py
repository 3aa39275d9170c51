from __future__ import annotations

import pytest
import torch

from gsoft_diffusion.orthogonal import cayley, exponential, free_numbers, orthogonal_blocks, resolvent, skew_symmetric

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


@pytest.mark.parametrize("parametrization", MAPS)
@pytest.mark.parametrize("size", [2, 3, 8, 20, 64, 320])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 10.0, 80.0])
def test_blocks_are_rotations(parametrization, size, norm):
    free = random_free(6, free_numbers(size))
    free *= norm / torch.linalg.matrix_norm(skew_symmetric(free, size), ord=2)[:, None]
    blocks = orthogonal_blocks(free, size, parametrization)
    assert blocks.dtype == torch.float32
    assert (blocks.mT @ blocks - torch.eye(size)).abs().max() < 1e-5
    assert (torch.linalg.det(blocks) > 0).all()  # no reflections


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.0, 1e-5, 0.1, 0.5, 0.7, 0.9, 3.0])  # products for small angles, LAPACK for large
@pytest.mark.parametrize("size", [3, 11, 32])
def test_resolvent_is_the_inverse(size, norm, dtype):
    skew = skew_symmetric(random_free(300, free_numbers(size), dtype=torch.float64), size)
    skew *= norm / torch.linalg.matrix_norm(skew, ord=2).max()
    made = resolvent(skew.to(dtype))
    exact = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - skew.to(dtype).double())
    assert made.dtype == dtype
    assert (made.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps


def test_resolvent_passes_on_what_is_not_a_number():
    skew = torch.zeros(2, 32, 32)
    skew[1, 0, 1] = torch.nan
    assert resolvent(skew).isnan().any()


@pytest.mark.parametrize("parametrization", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zeros_give_exact_identities(parametrization, dtype):
    blocks = orthogonal_blocks(torch.zeros(3, free_numbers(7), dtype=dtype), 7, parametrization)
    assert torch.equal(blocks, torch.eye(7, dtype=blocks.dtype).expand(3, 7, 7))


def test_sign_convention():
    """cayley(K) = (I + K)(I − K)⁻¹ ≈ I + 2K and exponential(K) ≈ I + K."""
    skew = skew_symmetric(random_free(3, free_numbers(5), dtype=torch.float64), 5)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(cayley(skew), (identity + skew) @ torch.linalg.inv(identity - skew))
    torch.testing.assert_close(cayley(1e-6 * skew), identity + 2e-6 * skew, atol=1e-10, rtol=0)
    torch.testing.assert_close(exponential(1e-6 * skew), identity + 1e-6 * skew, atol=1e-10, rtol=0)


@pytest.mark.parametrize("map_", [cayley, exponential])
def test_gradcheck(map_):
    free = random_free(2, 2, free_numbers(4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda numbers: map_(skew_symmetric(numbers, 4)), (free,))


def test_cayley_gradient_is_that_of_a_solve():
    skew = skew_symmetric(random_free(3, free_numbers(6), dtype=torch.float64), 6)
    weight = random_free(3, 6, 6, dtype=torch.float64)
    identity = torch.eye(6, dtype=torch.float64)
    ours, theirs = skew.clone().requires_grad_(), skew.clone().requires_grad_()
    (weight * cayley(ours)).sum().backward()
    (weight * torch.linalg.solve(identity - theirs, identity + theirs, left=False)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("parametrization", MAPS)
def test_autocast_and_half_input_do_not_lower_the_precision(parametrization):
    free = random_free(4, free_numbers(16))

    def blocks_and_gradient(autocast):
        numbers = free.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            blocks = orthogonal_blocks(numbers, 16, parametrization)
        blocks.sum().backward()
        return blocks, numbers.grad

    plain, under_autocast = blocks_and_gradient(False), blocks_and_gradient(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))
    half = orthogonal_blocks(free.bfloat16(), 16, parametrization)
    assert half.dtype == torch.float32
    assert (half.mT @ half - torch.eye(16)).abs().max() < 1e-5
