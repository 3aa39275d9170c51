from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gsoft import GSOFTError, truncation_error
from gsoft.exponential import coefficients, exponential_conv2d, exponential_kernel
from gsoft.skew_kernels import kernel_numbers, norm_bound, skew_kernel

RADII = [0.3, 1.0, 2.1, math.pi]
TERMS = [1, 2, 4, 5, 9, 12]


def largest_error(series: tuple[float, ...], radius: float) -> float:
    """Of the polynomial, on the segment of the imaginary axis where eigenvalues can be."""
    z = 1j * np.linspace(-radius, radius, 4001)
    return float(np.abs(np.polyval(series[::-1], z) - np.exp(z)).max())


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("terms", TERMS)
def test_the_error_is_within_its_bound_which_is_not_loose(radius, terms):
    bound = truncation_error(radius, terms)
    error = largest_error(coefficients(radius, terms), radius)
    assert error <= bound + 1e-14
    assert bound <= 3 * error + 1e-14 or terms == 1


@pytest.mark.parametrize("terms", [4, 5, 9])
def test_errs_less_than_taylors_series(terms):
    taylor = tuple(1 / math.factorial(k) for k in range(terms + 1))
    assert largest_error(coefficients(2.1, terms), 2.1) < largest_error(taylor, 2.1) / 2 ** (terms - 0.5)


def test_the_defaults_are_better_than_those_of_soc():
    assert truncation_error(2.1, 4) < 0.026 < 2.1**6 / math.factorial(6) / 4
    assert truncation_error(2.1, 9) < 1e-6 < 2.1**13 / math.factorial(13)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_is_the_exponential_of_the_convolutions_matrix(kernel_size):
    free = torch.randn(2, kernel_numbers(4, kernel_size), generator=torch.Generator().manual_seed(0)).double()
    skew = skew_kernel(free, 4, kernel_size)
    skew = 2.1 * skew / norm_bound(skew)[:, None, None, None]
    kernel = skew.flatten(0, 1).unflatten(1, (kernel_size, kernel_size)).permute(0, 3, 1, 2)
    pictures = torch.eye(8 * 25).double().unflatten(1, (8, 5, 5))
    matrix = F.conv2d(pictures, kernel, padding=kernel_size // 2, groups=2).flatten(1).mT
    found = exponential_conv2d(pictures, kernel, 2, coefficients(2.1, 9)).flatten(1).mT
    assert torch.linalg.matrix_norm(found - torch.matrix_exp(matrix), ord=2) < truncation_error(2.1, 9)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_a_pointwise_kernels_exponential_is_a_kernel(terms):
    torch.manual_seed(0)
    kernel, x, series = torch.randn(8, 4, 1, 1), torch.randn(2, 8, 3, 3), coefficients(1.0, terms)
    composed = F.conv2d(x, exponential_kernel(kernel, 2, series), groups=2)
    torch.testing.assert_close(composed, exponential_conv2d(x, kernel, 2, series), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("function", [coefficients, truncation_error])
@pytest.mark.parametrize(("radius", "terms", "message"), [(0, 4, "radius is 0"), (3.2, 4, "3.2"), (1, 0, "terms is 0")])
def test_what_has_no_bound(function, radius, terms, message):
    with pytest.raises(GSOFTError, match=message):
        function(radius, terms)
