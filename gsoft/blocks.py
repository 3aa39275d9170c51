"""Small orthogonal matrices from free numbers: skew-symmetric blocks, the Cayley map and the matrix exponential.

Convention, used everywhere: a skew-symmetric `K = −Kᵀ` has its free numbers above the diagonal, row by row, perhaps
times a factor (see `skew_factor`), and

    cayley(K)      = (I + K)(I − K)⁻¹ ≈ I + 2K
    exponential(K) = exp(K)           ≈ I + K

Both give exactly `I` for `K = 0`, always have determinant 1, and are computed in float32 (float64 for float64 input)
even under autocast: rounded to half precision a block is no longer orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsoft.autocast import without_autocast
from gsoft.differentiable_once import differentiable_once

# Measured on a CPU: docs/performance.md.
LAPACK_SIDE = 7  # up to this side LAPACK is the faster one
# From this side on, PyTorch's batched LU gives wrong results where a CPU has several threads: MKL then uses threads of
# its own in each of them (PyTorch issues 141358 and 142815; wrong from side 150 on).
BATCHED_LU_SIDE = 128
# Matrix entries that go through the products at a time: more of them leave a core's cache.
ENTRIES_AT_ONCE = 2**18
SCALED = "scaled_"  # what the name of a parametrization begins with if learned numbers are scaled
ROW = 64  # learned numbers in a row at which their factor is 1
# Up to which ‖K‖² a polynomial of this degree in −K² gives (I − K²)⁻¹ to 2⁻²⁵, half of float32's rounding.
REACH = {2: 0.006, 4: 0.08, 6: 0.29, 8: 0.61, 10: 1.04, 12: 1.57}


def free_numbers(size: int) -> int:
    """How many numbers decide a skew-symmetric matrix of this side: `b(b−1)/2`."""
    return size * (size - 1) // 2


def skew_factor(parametrization: str, size: int, nfactors: int, double: bool) -> float:
    """By what the learned numbers are multiplied to be the entries of `K`.

    parametrization: as in `RotationConfig`; 1 unless it begins with "scaled_". size: the side `b` of the blocks.
    nfactors: `m`. double: whether there is a rotation on either side of the weight.

    Under Adam each learned number moves by about the learning rate. A row of all rotations together has
    `m·(b−1)` of them, twice that if double, and a step turns the row's vector by the more the more they are: divided by
    their number, one learning rate turns every layer alike, whatever its width and its blocks. What is measured of
    this: docs/rates.md. Where a row has 64, the factor is 1. `exp(K)` turns half as far as Cayley's map.
    """
    map_, scaled = _map_of(parametrization)
    if not scaled:
        return 1.0
    factor = ROW / (nfactors * (size - 1) * (2 if double else 1))
    return float(np.float32(2 * factor if map_ is exponential else factor))


def skew_symmetric(free: Tensor, size: int, factor: float = 1.0) -> Tensor:
    """Skew-symmetric matrices with the given entries above the diagonal.

    free: the entries, row by row, `(…, b(b−1)/2)`. size: the side `b`. factor: by what they are multiplied. Returns
    `(…, b, b)` of the same dtype.
    """
    if size == 1:  # of which there is only 0, and no entry to select
        return free.new_zeros(*free.shape[:-1], 1, 1)
    place, sign = _remembered(_origins, free, size, factor)
    rows = free.reshape(-1, free.shape[-1])  # PyTorch selects from a matrix much faster than with more dimensions
    return (rows.index_select(1, place) * sign.to(free.dtype)).reshape(*free.shape[:-1], size, size)


def _skew_gradient(grad: Tensor) -> Tensor:
    """Gradient of a loss by the free numbers from its gradient by the skew-symmetric matrices `(…, b, b)`."""
    upper, lower = _remembered(_places, grad, grad.shape[-1])
    entries = grad.flatten(-2)
    return entries.index_select(-1, upper).sub_(entries.index_select(-1, lower))


def _remembered(make: Callable[..., tuple[Tensor, Tensor]], tensor: Tensor, *numbers: float) -> Any:
    """What `make` makes of the numbers on the tensor's device, made once, so that a GPU need not make it in every step.

    Not for tensors of other classes: such stand-ins belong to what is being looked at with them.
    """
    if type(tensor.detach()) is not Tensor:
        return make(tensor.device, *numbers)
    return _kept(make, tensor.device, *numbers)


@torch.compiler.assume_constant_result  # a compiled graph holds the tensors, and does not see how they are kept
def _kept(make: Callable[..., tuple[Tensor, Tensor]], device: torch.device, *numbers: float) -> tuple[Tensor, Tensor]:
    key = make, device, *numbers
    if key not in _REMEMBERED:
        with torch.inference_mode(False):  # for use in training later
            _REMEMBERED[key] = make(device, *numbers)
    return _REMEMBERED[key]


_REMEMBERED: dict[Any, tuple[Tensor, Tensor]] = {}


def _places(device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """Where the free numbers are in a flattened matrix: above the diagonal, and mirrored below."""
    row, column = torch.triu_indices(size, size, offset=1, device=device)
    return row * size + column, column * size + row


def _origins(device: torch.device, size: int, factor: float) -> tuple[Tensor, Tensor]:
    """Which free number is at each place of a flattened matrix, and its factor there, float32: 0 on the diagonal."""
    upper, lower = _places(device, size)
    place, sign = upper.new_zeros(size * size), torch.zeros(size * size, device=device)
    place[upper] = place[lower] = torch.arange(len(upper), device=device)
    sign[upper], sign[lower] = factor, -factor
    return place, sign


class _Cayley(torch.autograd.Function):
    """`Q = (I + K)(I − K)⁻¹`, of which alone is kept for the backward pass.

    From `dQ = ½ (I + Q) dK (I + Q)` follows `∂ℓ/∂K = ½ (I + Q)ᵀ (∂ℓ/∂Q) (I + Q)ᵀ`: two products. The factor of the free
    numbers goes into the second.
    """

    @staticmethod
    def forward(ctx: Any, size: int, factor: float, dtype: torch.dtype, *free: Tensor) -> tuple[Tensor, ...]:
        runs = _runs(len(free), free[0].shape[:-1].numel() * size * size, free[0].device)
        rotations = tuple(
            rotation
            for run in runs
            for rotation in _solve(skew_symmetric(torch.stack(free[run]), size, factor)).to(dtype).unbind()
        )
        ctx.factor = factor
        ctx.save_for_backward(*rotations)
        return rotations

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_free: list[Tensor] = []
        for run in _runs(len(grads), grads[0].numel(), grads[0].device):
            q, grad = (torch.stack(tensors[run]).flatten(0, -3) for tensors in (ctx.saved_tensors, grads))
            q, grad = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (q, grad))
            half = torch.baddbmm(grad, q.mT, grad)
            by_skew = torch.baddbmm(half, half, q.mT, beta=0.5 * ctx.factor, alpha=0.5 * ctx.factor)
            by_free.extend(_skew_gradient(by_skew).unflatten(0, (-1, *grads[0].shape[:-2])))
        return None, None, None, *by_free


def cayley(free: Sequence[Tensor], size: int, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, ...]:
    """Cayley map `Q = (I + K)(I − K)⁻¹` of skew-symmetric matrices with these free numbers (paper, §6.1).

    free: the numbers above the diagonal of each `K`, tensors `(…, b(b−1)/2)` of equal shape, float32 or float64. size:
    the side `b`. dtype: what the results are rounded to. factor: by what the numbers are multiplied. Returns one tensor
    `(…, b, b)` for each of `free`.

    Reaches every rotation without an eigenvalue −1. Differentiable once.
    """
    return _Cayley.apply(size, factor, dtype, *free)


def _runs(count: int, entries: int, device: torch.device) -> list[slice]:
    """Runs of so many tensors of so many entries that are computed at a time: on a CPU what a core's cache holds."""
    step = max(1, ENTRIES_AT_ONCE // entries) if device.type == "cpu" else count
    return [slice(first, first + step) for first in range(0, count, step)]


def _solve(skew: Tensor) -> Tensor:
    """`(I + K)(I − K)⁻¹ = 2(I − K)⁻¹ − I` of each `K` in skew `(N, …, b, b)`.

    `I − K` always has an inverse: eigenvalues of `K` are imaginary. LAPACK takes one matrix after the other, which is
    slow for the thousands of small ones of a model. On a CPU they go through batched products instead, as long as
    `‖K‖` is not too large:

        (I − K)⁻¹ = (I + K)(I + S)⁻¹,   S = −K²,   (I + S)⁻¹ ≈ a polynomial in S

    Its degree is chosen for each of the `N` by itself: no result depends on what is computed beside it.
    """
    size, dtype = skew.shape[-1], skew.dtype
    by_products = skew.is_cpu and size > LAPACK_SIDE and dtype == torch.float32
    if not by_products or torch.compiler.is_compiling():  # a graph cannot choose a degree by what is in a tensor
        return _solve_by_lapack(skew)
    square = skew @ skew.mT
    fourth = square @ square
    # At least every ‖S‖²: singular values of powers of a skew matrix come in pairs.
    norms = torch.linalg.vector_norm(fourth, dim=(-2, -1)).flatten(1).amax(1) / math.sqrt(2)
    degrees = [next((d for d, reach in REACH.items() if norm <= reach**2), 0) for norm in map(Tensor.item, norms)]
    if len(set(degrees)) == 1:
        return _solve_by_products(degrees[0], skew, square, fourth)
    rotations = torch.empty_like(skew)
    for degree in set(degrees):
        chosen = [index for index, other in enumerate(degrees) if other == degree]
        rotations[chosen] = _solve_by_products(degree, skew[chosen], square[chosen], fourth[chosen])
    return rotations


def _solve_by_products(degree: int, skew: Tensor, square: Tensor, fourth: Tensor) -> Tensor:
    """With a polynomial of this degree in `S = square`, whose square is `fourth`; degree 0: none is good enough."""
    if degree == 0:
        return _solve_by_lapack(skew)
    k, s, s2 = (matrices.flatten(0, -3) for matrices in (skew, square, fourth))
    twice = _polynomial(_coefficients(degree), s, s2)
    rotations = torch.baddbmm(twice, k, twice)
    _diagonal(rotations).sub_(1)
    return rotations.reshape(skew.shape)


def _solve_by_lapack(skew: Tensor) -> Tensor:
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if skew.is_cpu and skew.shape[-1] >= BATCHED_LU_SIDE:
        inverses = [torch.linalg.inv_ex(identity - one).inverse for one in skew.flatten(0, -3)]
        inverse = torch.stack(inverses).reshape(skew.shape)
    else:
        inverse = torch.linalg.inv_ex(identity - skew).inverse
    return 2 * inverse - identity


def _polynomial(coefficients: Sequence[float], x: Tensor, square: Tensor) -> Tensor:
    """`c₀ + c₁x + c₂x² + …` of an even degree for matrices `x` and `x²`, by Horner's rule in `x²`."""
    *rest, constant, linear, quadratic = coefficients
    value = torch.mul(square, quadratic).add_(x, alpha=linear)
    _diagonal(value).add_(constant)
    while rest:
        *rest, constant, linear = rest
        value = torch.baddbmm(x, square, value, beta=linear)
        _diagonal(value).add_(constant)
    return value


@cache
def _coefficients(degree: int) -> list[float]:
    """Of `2(1 − s·q(s)) ≈ 2/(1 + s)`, where q is `1/(1 + s)` at Chebyshev's nodes; exactly 2 at `s = 0`."""
    nodes = REACH[degree] * (1 + np.cos(math.pi * (np.arange(degree) + 0.5) / degree)) / 2
    interpolant = np.linalg.solve(np.vander(nodes, increasing=True), 1 / (1 + nodes))
    return [2.0, *(-2 * interpolant).tolist()]


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def exponential(free: Sequence[Tensor], size: int, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, ...]:
    """Matrix exponential `Q = exp(K)` of skew-symmetric matrices with these free numbers. Reaches every rotation.

    free: the numbers above the diagonal of each `K`, tensors `(…, b(b−1)/2)` of equal shape, float32 or float64. size:
    the side `b`. dtype: what the results are rounded to. factor: by what the numbers are multiplied. Returns one tensor
    `(…, b, b)` for each of `free`.

    In float32 the exponential's rounding error grows with size and angle, past 1e-5 for blocks of some hundreds; one
    step of Newton's iteration for the nearest orthogonal matrix, `Q ← Q (3I − QᵀQ) / 2`, removes it.
    """
    rotation = torch.matrix_exp(skew_symmetric(torch.stack(tuple(free)), size, factor))
    return (1.5 * rotation - 0.5 * (rotation @ (rotation.mT @ rotation))).to(dtype).unbind()


MAPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"cayley": cayley, "exp": exponential}


def _map_of(parametrization: str) -> tuple[Callable[..., tuple[Tensor, ...]], bool]:
    """The map from skew-symmetric to orthogonal blocks, and whether the learned numbers are scaled for it."""
    return MAPS[parametrization.removeprefix(SCALED)], parametrization.startswith(SCALED)


def orthogonal_blocks(
    free: Sequence[Tensor],
    size: int,
    parametrization: str,
    dtype: torch.dtype | None = None,
    *,
    double: bool = False,
) -> tuple[Tensor, ...]:
    """Orthogonal blocks `(m, r, b, b)` from free numbers `(m, r, b(b−1)/2)`, for each of some tensors of equal shape.

    free: the tensors, computed in float32, or float64 if they are. size: the side `b`. parametrization: as in
    `RotationConfig`. dtype: what the blocks are rounded to, and kept as for the backward pass; unless given, what they
    are computed in. double: whether there is a rotation on either side of the weight; see `skew_factor`. All zeros give
    exact identities. Raises KeyError for another parametrization.
    """
    make, _ = _map_of(parametrization)
    factor = skew_factor(parametrization, size, free[0].shape[0], double)
    with without_autocast(free[0].device):
        full = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in free]
        return make(full, size, dtype or full[0].dtype, factor)
