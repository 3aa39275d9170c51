"""The exponential of a skew-symmetric convolution, as a polynomial of it with a proven error.

The eigenvalues of a skew-symmetric matrix `L` are imaginary. With `‖L‖ ≤ R` the Chebyshev series on that segment is
(Jacobi and Anger; Tal-Ezer and Kosloff 1984 use it for `exp(−itH)`)

    exp(L) = J_0(R) + 2 Σ_{k≥1} J_k(R) P_k(L),   P_0 = 1,   P_1(z) = z/R,   P_{k+1}(z) = (2/R) z P_k(z) + P_{k−1}(z)

where `J_k` are Bessel functions and every `‖P_k(L)‖ ≤ 1`. Cut off after the same power `k` of `L`, its largest error is
about `2^k` times less than that of Taylor's series, for as many convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from gsoft.errors import GSOFTError


def truncation_error(radius: float, terms: int) -> float:
    """How far the polynomial is from `exp(L)` at most, in the spectral norm, if `‖L‖ ≤ radius`.

    radius: above 0, up to π. terms: the highest power of `L`, 1 or more. Every singular value of the polynomial is as
    close to 1, since `exp(L)` is orthogonal. From `|J_k(R)| ≤ (R/2)^k / k!`. Raises GSOFTError if an argument is out of
    range.
    """
    check_series(radius, terms)
    half = radius / 2
    return 2 * half ** (terms + 1) / math.factorial(terms + 1) / (1 - half / (terms + 2))


@cache
def coefficients(radius: float, terms: int) -> tuple[float, ...]:
    """The polynomial's coefficients `a_0 … a_terms`: `exp(L) ≈ Σ a_k L^k` for `‖L‖ ≤ radius`.

    radius: above 0, up to π. terms: the highest power of `L`, 1 or more. Raises GSOFTError if one is out of range.
    """
    check_series(radius, terms)
    before, now = [1.0] + terms * [0.0], [0.0, 1 / radius] + (terms - 1) * [0.0]
    total = [_bessel(0, radius) * a + 2 * _bessel(1, radius) * b for a, b in zip(before, now, strict=True)]
    for order in range(2, terms + 1):
        raised = [0.0, *(2 / radius * a for a in now[:-1])]
        before, now = now, [a + b for a, b in zip(raised, before, strict=True)]
        total = [a + 2 * _bessel(order, radius) * b for a, b in zip(total, now, strict=True)]
    return tuple(total)


def exponential_conv2d(x: Tensor, kernel: Tensor, groups: int, series: Sequence[float]) -> Tensor:
    """`Σ a_k L^k ⋆ x`, the exponential of a convolution, with as many convolutions as the series has powers.

    x: `(B, channels, H, W)`, or without B. kernel: `L`, `(channels, channels/groups, k, k)` with k odd, of the same
    dtype. series: `a_0 … a_terms`. Returns what has the shape of x.
    """
    result = x
    for last, now in zip(series[:0:-1], series[-2::-1], strict=True):  # Horner: a_0 (x + a_1/a_0 L (x + a_2/a_1 L …))
        result = torch.add(x, F.conv2d(result, kernel, padding="same", groups=groups), alpha=last / now)
    return series[0] * result


def exponential_kernel(kernel: Tensor, groups: int, series: Sequence[float]) -> Tensor:
    """The exponential of a 1×1 kernel, which is a 1×1 kernel itself: `Σ a_k L^k`.

    kernel: `L`, `(channels, channels/groups, 1, 1)`. groups: of the kernel. series: `a_0 … a_terms`. Returns a kernel
    of the same shape.
    """
    matrices = kernel.flatten(1).unflatten(0, (groups, -1))
    identity = torch.eye(matrices.shape[-1], dtype=kernel.dtype, device=kernel.device)
    result = series[-1] * matrices + series[-2] * identity
    for coefficient in series[-3::-1]:
        result = torch.baddbmm(coefficient * identity, result, matrices)
    return result.flatten(0, 1)[:, :, None, None]


def _bessel(order: int, x: float) -> float:
    """`J_order(x)` for `|x| ≤ π` by its power series."""
    terms = range(20)
    return sum((-1) ** s * (x / 2) ** (2 * s + order) / math.factorial(s) / math.factorial(s + order) for s in terms)


def check_series(radius: float, terms: int) -> None:
    """Raise GSOFTError unless there is a series of so many terms for this radius."""
    if not 0 < radius <= math.pi:
        raise GSOFTError(f"radius is {radius}; valid: above 0, up to π, where exp reaches every rotation")
    if terms < 1:
        raise GSOFTError(f"terms is {terms}; valid: 1 or more")
