from __future__ import annotations

import pytest
import torch

from gsoft import GSOFTError
from gsoft.blocks import free_numbers, orthogonal_blocks
from gsoft.group_and_shuffle import (
    back_to_input,
    back_to_input_rows,
    dense_factors,
    dense_reference,
    fit_blocks,
    permutation_matrix,
    rotate,
    rotate_back,
    rotate_gradients,
    shuffle,
    unshuffle,
)

STRUCTURES = [(4, 8), (8, 4), (1, 6), (6, 2), (3, 5), (16, 2), (9, 3), (64, 5)]  # (r, b)


def random_blocks(nfactors: int, nblocks: int, size: int, parametrization: str = "cayley", **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(nfactors, nblocks, free_numbers(size), generator=generator, dtype=torch.float64)
    return orthogonal_blocks([free.to(kwargs.get("dtype", torch.float64))], size, parametrization)[0]


@pytest.mark.parametrize(("nblocks", "size"), STRUCTURES)
def test_shuffle_is_the_stride_permutation(nblocks, size):
    x = torch.randn(2, nblocks * size, 3)
    permutation = permutation_matrix(nblocks, nblocks * size)
    grouped = x.unflatten(-2, (nblocks, size))
    assert torch.equal(shuffle(grouped).flatten(-3, -2), permutation @ x)
    assert torch.equal(unshuffle(grouped).flatten(-3, -2), permutation.mT @ x)
    assert torch.equal(unshuffle(shuffle(grouped)), grouped)


def test_two_factors_are_the_papers_formula():
    """Q = Pᵀ L P R with R = B_1 and L = B_2 (§6.1)."""
    blocks = random_blocks(2, 4, 3)
    permutation = permutation_matrix(4, 12).double()
    right, left = torch.block_diag(*blocks[0]), torch.block_diag(*blocks[1])
    torch.testing.assert_close(dense_reference(blocks), permutation.mT @ left @ permutation @ right)


@pytest.mark.parametrize(("nblocks", "size"), STRUCTURES)
@pytest.mark.parametrize("nfactors", [1, 2, 3, 4])
def test_fast_path_equals_the_dense_reference(nblocks, size, nfactors):
    blocks = random_blocks(nfactors, nblocks, size)
    x = torch.randn(nblocks * size, 3, dtype=torch.float64)
    weight = torch.randn_like(x)

    def value_and_gradients(apply):
        b, v = blocks.clone().requires_grad_(), x.clone().requires_grad_()
        y = apply(b, v)
        (weight * y).sum().backward()
        return y.detach(), b.grad, v.grad

    by_blocks, by_first = rotate_gradients(blocks, x, weight)
    dense = value_and_gradients(lambda b, v: dense_reference(b) @ v)
    dense_back = value_and_gradients(lambda b, v: dense_reference(b).mT @ v)
    for ours, reference in [
        (value_and_gradients(rotate), dense),
        (value_and_gradients(rotate_back), dense_back),
        ((rotate(blocks, x), by_blocks, back_to_input(blocks, by_first)), dense),
        ((rotate_back(blocks, x), rotate_gradients(blocks, weight, x)[0], rotate(blocks, weight)), dense_back),
    ]:
        for ours_part, part in zip(ours, reference, strict=True):
            torch.testing.assert_close(ours_part, part, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("nblocks", "size"), STRUCTURES)
@pytest.mark.parametrize("nfactors", [1, 2, 3])
def test_leading_dimensions_are_a_batch(nblocks, size, nfactors):
    blocks = torch.stack([random_blocks(nfactors, nblocks, size), -random_blocks(nfactors, nblocks, size)])
    x, grad = torch.randn(2, 2, nblocks * size, 3, dtype=torch.float64)
    for apply in (rotate, rotate_back):
        torch.testing.assert_close(apply(blocks, x), torch.stack([apply(blocks[i], x[i]) for i in range(2)]))
    by_blocks, by_first = rotate_gradients(blocks, x, grad)
    for i in range(2):
        torch.testing.assert_close((by_blocks[i], by_first[i]), rotate_gradients(blocks[i], x[i], grad[i]))
    rows = back_to_input_rows(blocks, by_first)
    torch.testing.assert_close(rows, back_to_input(blocks, by_first).sum(0).mT)
    assert rows.is_contiguous()


@pytest.mark.parametrize(("nblocks", "size"), STRUCTURES)
@pytest.mark.parametrize("nfactors", [1, 2, 3])
@pytest.mark.parametrize("parametrization", ["cayley", "exp"])
def test_q_is_orthogonal_in_float32(nblocks, size, nfactors, parametrization):
    blocks = random_blocks(nfactors, nblocks, size, parametrization, dtype=torch.float32)
    identity = torch.eye(nblocks * size)
    q = rotate(blocks, identity)
    assert (q.mT @ q - identity).abs().max() < 1e-5
    assert (rotate_back(blocks, rotate(blocks, identity)) - identity).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nfactors", [1, 2, 3])
def test_identity_blocks_change_no_bit(dtype, nfactors):
    blocks = torch.eye(5, dtype=dtype).expand(nfactors, 8, 5, 5)
    x = torch.randn(40, 3).to(dtype)
    assert torch.equal(rotate(blocks, x), x)
    assert torch.equal(rotate_back(blocks, x), x)


@pytest.mark.parametrize(("nblocks", "size"), [*STRUCTURES, (5, 2), (7, 3), (32, 3), (64, 20)])
def test_dense_factors_fill_q_and_one_fewer_do_not(nblocks, size):
    nfactors = dense_factors(nblocks, size)
    assert (dense_reference(torch.ones(nfactors, nblocks, size, size)) > 0).all()
    if nfactors > 1:
        assert (dense_reference(torch.ones(nfactors - 1, nblocks, size, size)) == 0).any()


@pytest.mark.parametrize(("nblocks", "size", "expected"), [(1, 8, 1), (8, 8, 2), (9, 8, 3), (64, 5, 4), (64, 20, 3)])
def test_dense_factors(nblocks, size, expected):
    assert dense_factors(nblocks, size) == expected


def test_fit_blocks():
    assert fit_blocks(320, 64, None, "layer") == (64, 5)
    assert fit_blocks(320, None, 32, "layer") == (10, 32)
    assert fit_blocks(2**60, 2**30, None, "layer") == (2**30, 2**30)  # without going through all numbers


@pytest.mark.parametrize(
    ("width", "nblocks", "block_size", "valid"),
    [
        (12, 5, None, "1, 2, 3, 4, 6"),
        (12, 12, None, "1, 2, 3, 4, 6"),
        (12, None, 5, "2, 3, 4, 6, 12"),
        (12, None, 24, "2, 3, 4, 6, 12"),
        (12, None, 1, "2, 3, 4, 6, 12"),
        (12, 0, None, "1, 2, 3, 4, 6"),
        (12, -3, None, "1, 2, 3, 4, 6"),
        (1, 1, None, "none"),
    ],
)
def test_fit_blocks_names_layer_width_and_valid_values(width, nblocks, block_size, valid):
    with pytest.raises(GSOFTError) as error:
        fit_blocks(width, nblocks, block_size, "unet.mid.to_q")
    assert "unet.mid.to_q" in str(error.value)
    assert f"width {width}" in str(error.value)
    assert str(error.value).endswith(f"valid: {valid}")
