from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gsoft.skew_kernels import kernel_numbers, norm_bound, skew_kernel


def some_numbers(groups: int, size: int, kernel_size: int) -> torch.Tensor:
    return torch.randn(groups, kernel_numbers(size, kernel_size), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
class TestSkewKernel:
    def test_is_skew_symmetric_and_every_number_counts_as_much(self, kernel_size):
        free = some_numbers(2, 6, kernel_size)
        kernel = skew_kernel(free, 6, kernel_size).unflatten(2, (kernel_size, kernel_size))
        assert torch.equal(kernel, -kernel.transpose(1, 4).flip(2, 3))
        torch.testing.assert_close(kernel.square().sum(), free.square().sum())

    def test_a_step_moves_the_kernel_as_one_on_the_whole_would(self, kernel_size):
        """A step down any loss, here a linear one, moves `½(M − Mᵀ)` by the skew part of the loss's gradient."""
        free = some_numbers(1, 4, kernel_size).requires_grad_()
        grad = torch.randn(1, 4, kernel_size**2, 4)
        (by_free,) = torch.autograd.grad(skew_kernel(free, 4, kernel_size), free, grad)
        skew_part = (grad - grad.transpose(1, 3).flip(2)) / 2
        torch.testing.assert_close(skew_kernel(by_free, 4, kernel_size), skew_part)

    def test_as_many_numbers_as_dimensions(self, kernel_size):
        count = kernel_numbers(4, kernel_size)
        rows = torch.stack([skew_kernel(row[None], 4, kernel_size).flatten() for row in torch.eye(count)])
        assert int(torch.linalg.matrix_rank(rows)) == count
        assert 2 * count == kernel_size**2 * 16 - 4  # the skew-symmetric ones of all these kernels


def test_one_channel_has_taps_and_a_middle_of_zero():
    kernel = skew_kernel(some_numbers(2, 1, 3), 1, 3).flatten(1)
    assert torch.equal(kernel, -kernel.flip(1))
    assert (kernel[:, 4] == 0).all()
    assert (kernel[:, :4] != 0).all()


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("decay", [0.0, 0.5])
class TestNormBound:
    def kernel(self, kernel_size: int, decay: float) -> torch.Tensor:
        """With `decay`, singular values that differ much."""
        kernel = skew_kernel(some_numbers(3, 8, kernel_size), 8, kernel_size)
        scales = torch.exp(-decay * torch.arange(8.0))
        return kernel * scales[:, None, None] * scales

    def test_bounds_the_convolution_and_is_close_to_the_matrix(self, kernel_size, decay):
        kernel = self.kernel(kernel_size, decay)
        bound = norm_bound(kernel)
        matrix_norm = torch.linalg.matrix_norm(kernel.flatten(2), ord=2)
        assert (bound >= kernel_size * matrix_norm * (1 - 1e-6)).all()
        assert (bound <= kernel_size * matrix_norm * 8 ** (1 / 64) * (1 + 1e-6)).all()
        taps = kernel.unflatten(2, (kernel_size, kernel_size)).permute(0, 1, 4, 2, 3)
        for one, its_bound in zip(taps, bound, strict=True):
            pictures = torch.eye(8 * 49).unflatten(1, (8, 7, 7))
            matrix = F.conv2d(pictures, one, padding=kernel_size // 2).flatten(1)
            assert torch.linalg.matrix_norm(matrix, ord=2) <= its_bound

    def test_its_gradient_is_that_of_the_norm(self, kernel_size, decay):
        """Where the largest singular value of a group is not double: of the first kernel's numbers, at random."""
        kernel = torch.randn(3, 8, kernel_size**2, 8, generator=torch.Generator().manual_seed(1)).double()
        kernel[:, 0] *= 3
        kernel.requires_grad_()
        bound = norm_bound(kernel)
        norm = torch.linalg.matrix_norm(kernel.flatten(2), ord=2)
        (ours,), (theirs,) = (torch.autograd.grad(value.log().sum(), kernel) for value in (bound, norm))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_bound_of_nothing_is_nothing():
    kernel = torch.zeros(2, 4, 9, 4, requires_grad=True)
    bound = norm_bound(kernel)
    assert (bound < 1e-15).all()
    assert torch.autograd.grad(bound.sum(), kernel)[0].isfinite().all()
