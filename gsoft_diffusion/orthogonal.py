"""Small orthogonal matrices from free numbers: skew-symmetric blocks, the Cayley map and the matrix exponential.

Convention, used everywhere: a skew-symmetric `K = −Kᵀ` has its free numbers above the diagonal, row by row, and

    cayley(K)      = (I + K)(I − K)⁻¹ ≈ I + 2K
    exponential(K) = exp(K)           ≈ I + K

Both give exactly `I` for `K = 0`, always have determinant 1, and are computed in float32 (float64 for float64 input)
even under autocast: rounded to half precision a block is no longer orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Measured on a CPU: docs/performance.md.
LAPACK_SIDE = 10  # up to this side LAPACK is the faster one
TOGETHER = 256  # matrices that go through the products at a time
PRODUCTS_BELOW = 0.75  # bound of ‖K‖ above which the products are too many


def free_numbers(size: int) -> int:
    """How many numbers decide a skew-symmetric matrix of this side: `b(b−1)/2`."""
    return size * (size - 1) // 2


def skew_symmetric(free: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices with the given entries above the diagonal.

    free: `(…, b(b−1)/2)`; returns `(…, b, b)` of the same dtype.
    """
    row, column = torch.triu_indices(size, size, offset=1, device=free.device)
    zeros = free.new_zeros(*free.shape[:-1], size * size)
    upper = zeros.index_copy(-1, row * size + column, free).unflatten(-1, (size, size))
    return upper - upper.mT


class _Cayley(torch.autograd.Function):
    """`Q = (I + K)(I − K)⁻¹ = 2M − I` with `M = (I − K)⁻¹`.

    From `dM = M dK M` follows `∂ℓ/∂K = 2 Mᵀ (∂ℓ/∂Q) Mᵀ`: one inverse forward, two products backward.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, skew: Tensor) -> Tensor:
        inverse = resolvent(skew)
        ctx.save_for_backward(inverse)
        return 2 * inverse - torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return 2 * (inverse.mT @ grad @ inverse.mT)


def cayley(skew: Tensor) -> Tensor:
    """Cayley map `Q = (I + K)(I − K)⁻¹` of every matrix in the batch (paper, §6.1).

    skew: `(…, b, b)`; returns the same shape. Reaches every rotation without an eigenvalue −1. Differentiable once.
    """
    with full_precision(skew):
        return _Cayley.apply(_at_least_float32(skew))


def resolvent(skew: Tensor) -> Tensor:
    """`(I − K)⁻¹` of every matrix in the batch, `(…, b, b)` in and out; it always exists, eigenvalues are imaginary.

    LAPACK takes one matrix after the other, which is slow for the thousands of small ones of a model. On a CPU they go
    through batched products instead, as many at a time as a core's cache holds.
    """
    size = skew.shape[-1]
    if not skew.is_cpu or size <= LAPACK_SIDE:
        return _resolvent_by_lapack(skew)
    parts = skew.reshape(-1, size, size).split(TOGETHER)
    return torch.cat([_resolvent_by_products(part) for part in parts]).reshape(skew.shape)


def _resolvent_by_products(skew: Tensor) -> Tensor:
    """`(I − K)⁻¹ = (I + K)(I + K²)(I + K⁴)…` for `‖K‖ < 1`, up to rounding; by LAPACK where that takes many."""
    bound = _norm_bound(skew)
    if not bound < PRODUCTS_BELOW:
        return _resolvent_by_lapack(skew)
    power, inverse = skew, skew + torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    while bound**2 > torch.finfo(skew.dtype).eps / 8:
        power = power @ power
        inverse = torch.baddbmm(inverse, inverse, power)
        bound = min(bound**2, _norm_bound(power))
    return inverse


def _norm_bound(power: Tensor) -> float:
    """At least every `‖Kⁱ‖` in the batch: singular values of skew matrices come in pairs, and so do those of powers."""
    return torch.linalg.vector_norm(power, dim=(-2, -1)).max().item() / math.sqrt(2)


def _resolvent_by_lapack(skew: Tensor) -> Tensor:
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.inv_ex(identity - skew).inverse


def exponential(skew: Tensor) -> Tensor:
    """Matrix exponential `Q = exp(K)` of every matrix in the batch; `(…, b, b)` in and out. Reaches every rotation.

    In float32 the exponential's rounding error grows with size and angle, past 1e-5 for blocks of some hundreds; one
    step of Newton's iteration for the nearest orthogonal matrix, `Q ← Q (3I − QᵀQ) / 2`, removes it.
    """
    with full_precision(skew):
        rotation = torch.matrix_exp(_at_least_float32(skew))
        return 1.5 * rotation - 0.5 * (rotation @ (rotation.mT @ rotation))


PARAMETRIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {"cayley": cayley, "exp": exponential}


def orthogonal_blocks(free: Tensor, size: int, parametrization: str) -> Tensor:
    """Orthogonal blocks `(…, b, b)` from their free numbers `(…, b(b−1)/2)`; all zeros give exact identities.

    parametrization: "cayley" or "exp".
    """
    return PARAMETRIZATIONS[parametrization](skew_symmetric(_at_least_float32(free), size))


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context in which autocast does not touch this tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
