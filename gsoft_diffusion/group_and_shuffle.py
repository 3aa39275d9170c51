"""Group-and-shuffle (GS) orthogonal matrices: the algorithm of the paper.

    Q = (P^{m−1})ᵀ · B_m · P · B_{m−1} · … · P · B_1        for m = 2:  Q = Pᵀ L P R

Every `B_i` is block-diagonal with `r` orthogonal blocks of side `b`, `n = r·b` ("group"), and `P = P_(r, n)` is the
stride permutation ("shuffle"). With identity blocks `Q = I`. Nothing of size `n × n` is ever built: `Q x` costs
`m·b·n` multiply-adds and `m` shuffles, and each shuffle is one transposed view.

Gorbunov, Yudin, Soboleva, Alanov, Naumov, Rakhuba: Group and Shuffle: Efficient Structured Orthogonal
Parametrization, NeurIPS 2024, arXiv 2406.10019. Definitions 3.1, 5.1 and 5.2, Theorem 2, §6.1.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from gsoft_diffusion.errors import UserError


def rotate(blocks: Tensor, x: Tensor) -> Tensor:
    """`Q x` along the last dimension of x.

    blocks: `(m, r, b, b)`, the diagonal blocks of `B_1 … B_m`; x: `(…, n)` of the same dtype. Returns `(…, n)`.
    """
    nfactors, nblocks = blocks.shape[:2]
    x = group(blocks[0], x)
    for factor in blocks[1:]:
        x = group(factor, shuffle(x, nblocks))
    for _ in range(nfactors - 1):
        x = unshuffle(x, nblocks)
    return x


def rotate_back(blocks: Tensor, x: Tensor) -> Tensor:
    """`Qᵀ x` along the last dimension of x, which undoes `rotate`; shapes as there."""
    nfactors, nblocks = blocks.shape[:2]
    for _ in range(nfactors - 1):
        x = shuffle(x, nblocks)
    for factor in blocks[1:].flip(0):
        x = unshuffle(group(factor.mT, x), nblocks)
    return group(blocks[0].mT, x)


def group(factor: Tensor, x: Tensor) -> Tensor:
    """`B x`: block `i` of the factor `(r, b, b)` acts on the `i`-th run of `b` entries of x `(…, r·b)`."""
    nblocks, size = factor.shape[:2]
    grouped = x.reshape(-1, nblocks, size).transpose(0, 1)  # (r, …, b)
    return (grouped @ factor.mT).transpose(0, 1).reshape(x.shape)


def shuffle(x: Tensor, nblocks: int) -> Tensor:
    """`P x` for the stride permutation `P_(r, n)`: index `i` goes to `(i mod r)·(n/r) + ⌊i/r⌋` (Definition 5.2)."""
    return x.unflatten(-1, (-1, nblocks)).mT.flatten(-2)


def unshuffle(x: Tensor, nblocks: int) -> Tensor:
    """`Pᵀ x`, which undoes `shuffle`."""
    return x.unflatten(-1, (nblocks, -1)).mT.flatten(-2)


def dense_factors(nblocks: int, block_size: int) -> int:
    """The fewest factors with which `Q` has no forced zeros: `1 + ⌈log_b r⌉` (Theorem 2)."""
    nfactors = 1
    while block_size ** (nfactors - 1) < nblocks:
        nfactors += 1
    return nfactors


def fit_blocks(width: int, nblocks: int | None, block_size: int | None, layer: str) -> tuple[int, int]:
    """`(r, b)` with `r·b = width`, from the one of `nblocks` and `block_size` that is given.

    Raises UserError naming the layer, its width and the valid values if the width does not fit, or `b` would be 1
    (blocks of side 1 cannot rotate anything).
    """
    name, value = ("nblocks", nblocks) if nblocks is not None else ("block_size", block_size)
    sizes = [size for size in range(2, width + 1) if width % size == 0]
    valid = sorted(width // size for size in sizes) if name == "nblocks" else sizes
    if value not in valid:
        choices = ", ".join(map(str, valid)) or "none"
        raise UserError(
            f"{layer} has width {width}, which {name} {value} does not divide into blocks; valid: {choices}"
        )
    return (value, width // value) if name == "nblocks" else (width // value, value)


def dense_reference(blocks: Tensor) -> Tensor:
    """`Q` as an `n × n` matrix, multiplied out from the paper's definitions: slow, for tests."""
    nfactors, nblocks, size = blocks.shape[:3]
    permutation = permutation_matrix(nblocks, nblocks * size).to(blocks)
    factors = [torch.block_diag(*factor) for factor in blocks]
    shuffled = reduce(lambda product, factor: factor @ permutation @ product, factors[1:], factors[0])
    return torch.linalg.matrix_power(permutation, nfactors - 1).mT @ shuffled


def permutation_matrix(k: int, n: int) -> Tensor:
    """The stride permutation `P_(k, n)` of Definition 5.2 as a matrix of zeros and ones."""
    matrix = torch.zeros(n, n)
    for index in range(n):
        matrix[(index % k) * (n // k) + index // k, index] = 1
    return matrix
