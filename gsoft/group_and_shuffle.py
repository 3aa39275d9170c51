"""Group-and-shuffle (GS) orthogonal matrices: the algorithm of the paper.

    Q = (P^{m−1})ᵀ · B_m · P · B_{m−1} · … · P · B_1        for m = 2:  Q = Pᵀ L P R

Every `B_i` is block-diagonal with `r` orthogonal blocks of side `b`, `n = r·b` ("group"), and `P = P_(r, n)` is the
stride permutation ("shuffle"). With identity blocks `Q = I`. Nothing of size `n × n` is ever built: `Q x` costs
`m·b·n` multiply-adds and `m` shuffles.

Vectors are columns here: `x` is `(n, T)` for `T` vectors, and inside `(r, b, T)`, one matrix for each block. Then a
block acts on whole rows, `P` is a transposition of the first two of `(b, r, T)`, and no index is ever looked up.

Gorbunov, Yudin, Soboleva, Alanov, Naumov, Rakhuba: Group and Shuffle: Efficient Structured Orthogonal
Parametrization, NeurIPS 2024, arXiv 2406.10019. Definitions 3.1, 5.1 and 5.2, Theorem 2, §6.1.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from gsoft.errors import GSOFTError


def rotate(blocks: Tensor, x: Tensor, *, rows: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """`Q x`, factor by factor (paper, Definitions 5.1 and 5.2; for `m = 2`, §6.1).

    blocks: `(…, m, r, b, b)`, the diagonal blocks of `B_1 … B_m`. x: `(…, n, T)` of any layout, taken in the dtype of
    the blocks. Leading dimensions, equal in both, are a batch. rows: return `(Q x)ᵀ (…, T, n)` instead of `(…, n, T)`.
    dtype: of the result, unless it is that of the blocks. The result is contiguous.
    """
    nfactors = blocks.shape[-4]
    x = _grouped(x, blocks)
    for index in range(nfactors):
        x = group(blocks[..., index, :, :, :], shuffle(x) if index else x)
    return _ungrouped(x, nfactors - 1, rows, dtype or blocks.dtype)


def rotate_back(blocks: Tensor, x: Tensor, *, rows: bool = False) -> Tensor:
    """`Qᵀ x`, which undoes `rotate` as far as the blocks are orthogonal. Arguments and result as in `rotate`."""
    nfactors = blocks.shape[-4]
    x = _grouped(x, blocks)
    for _ in range(nfactors - 1):
        x = shuffle(x)
    for index in reversed(range(nfactors)):
        x = group(blocks[..., index, :, :, :].mT, x)
        if index:
            x = unshuffle(x)
    return _ungrouped(x, 0, rows, blocks.dtype)


def rotate_gradients(blocks: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a loss by `blocks` and by `B_1 x` from its gradient by `y = Q x`, in closed form.

    blocks: `(…, m, r, b, b)`. x: `(…, n, T)`. grad: the gradient by `y`, `(…, n, T)`. Both of any layout, taken in the
    dtype of the blocks, which the results `(…, m, r, b, b)` and `(…, r, b, T)` have.

    The gradient by `B_1 x` is one product before that by `x`, which not everyone needs: `back_to_input`. What the
    factors made of `x` on the way is not kept from the forward pass but made again. For `y = Qᵀ x` the gradient by the
    blocks is that of `rotate_gradients(blocks, grad, x)`: `⟨g, Qᵀx⟩ = ⟨x, Q g⟩`.
    """
    nfactors = blocks.shape[-4]
    inputs = [_laid_out(_grouped(x, blocks), blocks.dtype)]  # contiguous, as it goes into two products
    for index in range(nfactors - 1):
        inputs.append(shuffle(group(blocks[..., index, :, :, :], inputs[-1])).contiguous())
    grad = _grouped(grad, blocks)
    for _ in range(nfactors - 1):
        grad = shuffle(grad)
    grad = _laid_out(grad, blocks.dtype)
    by_block = []
    for index in reversed(range(nfactors)):
        by_block.append(batched_product(grad, inputs.pop().mT))
        if index:
            grad = unshuffle(group(blocks[..., index, :, :, :].mT, grad))
    return torch.stack(by_block[::-1], dim=-4), grad


def back_to_input(blocks: Tensor, grad: Tensor) -> Tensor:
    """Gradient by `x` from that by `B_1 x`, which `rotate_gradients` gives.

    blocks: `(…, m, r, b, b)`, as in `rotate`. grad: `(…, r, b, T)` of the same dtype. Returns `(…, n, T)`.
    """
    return group(blocks[..., 0, :, :, :].mT, grad).flatten(-3, -2)


def back_to_input_rows(blocks: Tensor, grad: Tensor) -> Tensor:
    """Sum of the gradients by one `x` of N rotations, as rows `(T, n)`.

    blocks: `(N, m, r, b, b)`. grad: of each `B_1 x`, `(N, r, b, T)`. The sum is part of one product for each block,
    which also turns columns into rows on its way.
    """
    first, grad = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (blocks[:, 0], grad))  # (r, N·b, b or T)
    if torch.compiler.is_compiling():  # which cannot write into a transposed result
        return torch.bmm(grad.mT, first).transpose(0, 1).flatten(1)
    rows = grad.new_empty(grad.shape[-1], len(first), first.shape[-1])
    torch.bmm(grad.mT, first, out=rows.transpose(0, 1))
    return rows.flatten(1)


def scale_outputs_(blocks: Tensor, scale: Tensor) -> Tensor:
    """Make `Q` into `diag(scale)·Q`, in place: the last factor's rows are multiplied.

    blocks: `(…, m, r, b, b)`, which are changed and returned. scale: `(…, n)`, of any dtype. The same is what gradients
    by `Q` need.
    """
    nfactors, nblocks, size, _ = blocks.shape[-4:]
    rows = scale.unflatten(-1, (nblocks, size)).unsqueeze(-1)
    for _ in range(nfactors - 1):
        rows = shuffle(rows)
    blocks[..., -1, :, :, :].mul_(rows)
    return blocks


def scale_gradient(blocks: Tensor, grad: Tensor) -> Tensor:
    """Gradient of a loss by the scale of `diag(scale)·Q` from its gradient by the blocks of that product.

    blocks: of `Q`, `(…, m, r, b, b)`. grad: of the same shape. Returns `(…, n)`, in at least float32.
    """
    last, by_last = (tensor[..., -1, :, :, :] for tensor in (blocks, grad))
    by_scale = (last.to(torch.promote_types(last.dtype, torch.float32)) * by_last).sum(-1, keepdim=True)
    for _ in range(blocks.shape[-4] - 1):
        by_scale = unshuffle(by_scale)
    return by_scale.flatten(-3)


def _grouped(x: Tensor, blocks: Tensor) -> Tensor:
    """A view of x `(…, n, T)` as one matrix for each block, `(…, r, b, T)`."""
    return x.unflatten(-2, blocks.shape[-3:-1])


def _ungrouped(x: Tensor, unshuffles: int, rows: bool, dtype: torch.dtype) -> Tensor:
    """Columns `(…, n, T)` or rows `(…, T, n)` of x `(…, r, b, T)`, after so many `unshuffle`; with one copy less."""
    for _ in range(unshuffles - 1):
        x = unshuffle(x)
    if unshuffles:
        x = x.transpose(-3, -2)
    x = _laid_out(x.movedim(-1, -3) if rows else x, dtype)
    return x.flatten(-2) if rows else x.flatten(-3, -2)


def _laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, contiguous and of this dtype, in one copy or none."""
    return x.contiguous() if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def group(factor: Tensor, x: Tensor) -> Tensor:
    """`B x`: block `i` of the factor `(…, r, b, b)` acts on the `i`-th run of `b` entries of x `(…, r, b, T)`.

    x may be of another dtype; the result has the factor's.
    """
    if factor.shape[-1] == 1:
        return factor * x.to(factor.dtype)
    # Rows in one piece: a product of transposed matrices rounds in another way, which would depend on the batch.
    in_rows = x.dtype == factor.dtype and x.stride(-1) == 1
    return batched_product(factor, x if in_rows else _laid_out(x, factor.dtype))


def shuffle(x: Tensor) -> Tensor:
    """`P x` for the stride permutation `P_(r, n)` (paper, Definition 5.2): index `i` goes to `(i mod r)·(n/r) + ⌊i/r⌋`.

    x: `(…, r, b, T)`, as the result.
    """
    nblocks, size = x.shape[-3:-1]
    return x.flatten(-3, -2).unflatten(-2, (size, nblocks)).transpose(-3, -2)


def unshuffle(x: Tensor) -> Tensor:
    """`Pᵀ x`, which undoes `shuffle`; x: `(…, r, b, T)`, as the result."""
    nblocks, size = x.shape[-3:-1]
    return x.transpose(-3, -2).flatten(-3, -2).unflatten(-2, (nblocks, size))


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of `(…, i, j)` and `(…, j, k)` with equal batches: `matmul` without its bookkeeping, one kernel."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def dense_factors(nblocks: int, block_size: int) -> int:
    """The fewest factors with which `Q` has no forced zeros: `1 + ⌈log_b r⌉` (paper, Theorem 2).

    nblocks: the blocks `r` of each factor. block_size: their side `b`, 2 or more.
    """
    nfactors = 1
    while block_size ** (nfactors - 1) < nblocks:
        nfactors += 1
    return nfactors


def fit_blocks(width: int, nblocks: int | None, block_size: int | None, layer: str) -> tuple[int, int]:
    """`(r, b)` with `r·b = width`, from the one of `nblocks` and `block_size` that is given.

    width: the side `n` of `Q`. nblocks, block_size: `r` and `b`, one of them None. layer: whose width it is, for the
    message.

    Raises GSOFTError naming the layer, its width and the valid values if the width does not fit, or `b` would be 1
    (blocks of side 1 cannot rotate anything).
    """
    name, value = ("nblocks", nblocks) if nblocks is not None else ("block_size", block_size)
    assert value is not None, "neither is given"
    other, rest = divmod(width, value) if value else (0, width)
    fitted = (value, other) if name == "nblocks" else (other, value)
    if rest or fitted[1] < 2:
        sizes = [size for size in range(2, width + 1) if width % size == 0]
        valid = sorted(width // size for size in sizes) if name == "nblocks" else sizes
        choices = ", ".join(map(str, valid)) or "none"
        raise GSOFTError(
            f"{layer} has width {width}, which {name} {value} does not divide into blocks; valid: {choices}"
        )
    return fitted


def dense_reference(blocks: Tensor) -> Tensor:
    """`Q` as a matrix `(n, n)`, multiplied out from the paper's definitions (5.1 and 5.2): slow, for tests.

    blocks: `(m, r, b, b)`, of the dtype of the result.
    """
    nfactors, nblocks, size = blocks.shape[:3]
    permutation = permutation_matrix(nblocks, nblocks * size).to(blocks)
    factors = [torch.block_diag(*factor) for factor in blocks]
    shuffled = reduce(lambda product, factor: factor @ permutation @ product, factors[1:], factors[0])
    return torch.linalg.matrix_power(permutation, nfactors - 1).mT @ shuffled


def permutation_matrix(k: int, n: int) -> Tensor:
    """The stride permutation `P_(k, n)` (paper, Definition 5.2) as a matrix `(n, n)` of zeros and ones, float32.

    k: the stride, a divisor of n. n: the side.
    """
    matrix = torch.zeros(n, n)
    for index in range(n):
        matrix[(index % k) * (n // k) + index // k, index] = 1
    return matrix
