"""What an adapter of gsoft-diffusion does to a weight, in PyTorch alone: for programs that do not have `gsoft`.

    W' = diag(s) · Q_out W Q_in        Q = (P^{m−1})ᵀ · B_m · P · … · P · B_1

`B_i` is block-diagonal with `r` orthogonal blocks of side `b`, `P` a fixed shuffle (arXiv 2406.10019). Everything is
computed in float32. At strength `t` blocks are made from `t·K` instead of `K`, and the scale is `1 + t·(s − 1)`: every
strength is a rotation.

A file has for each layer `<layer>.q_in` and perhaps `<layer>.q_out`, `(m, r, b(b−1)/2)`, and `<layer>.output_scale`,
`(out,)`. The name of an empty tensor, such as `parametrization.cayley`, tells how blocks are made. With "scaled_"
before the map's name, the entries of K are the numbers times `64 / (m·(b−1))`, half of that where there is a `q_out`,
and twice that for exp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PARAMETRIZATIONS = {f"parametrization.{name}": name for name in ("cayley", "exp", "scaled_cayley", "scaled_exp")}
ROW = 64  # learned numbers in a row at which scaling changes nothing
MAX_FACTORS = 32  # more than any layer needs: with blocks of 2 they fill a rotation of side 2³²
# From this side on, PyTorch's batched LU is wrong on CPUs with several threads (PyTorch issues 141358 and 142815).
BATCHED_LU_SIDE = 128


class Layer(NamedTuple):
    """What a file has of one linear layer.

    q_in, q_out: `(m, r, b(b−1)/2)`, output_scale: `(out,)`, all float32. parametrization: of `PARAMETRIZATIONS`.
    first_columns: whether programs have more in the layer's matrix, after its own columns.
    """

    q_in: Tensor
    q_out: Tensor | None
    output_scale: Tensor | None
    parametrization: str
    first_columns: bool = False


class Blocks(NamedTuple):
    """What a layer's numbers mean at one strength: blocks `(m, r, b, b)` and `(out,)` scales, float32."""

    q_in: Tensor
    q_out: Tensor | None
    output_scale: Tensor | None


# Files

# FLUX.2's single-stream blocks: the matrix that the attention's outputs go through, and the feed-forward layer's.
SHARED = re.compile(r"single_transformer_blocks\.\d+\.attn\.to_out$")


def layer_name(module: str) -> str:
    """A layer's name in the file.

    module: what LoRA loaders call the layer: its path in a diffusers pipeline, with or without `.processor`.
    """
    name = module.replace(".processor.", ".")
    name = re.sub(r"^(text_encoder\w*)\.text_model\.encoder\.layers\.(\d+)\.self_attn\.", r"\1.layers.\2.", name)
    return name[: -len(".0")] if name.endswith(".to_out.0") else name


def find_layer(module: str, tensors: Mapping[str, Tensor]) -> tuple[Layer, set[str]] | None:
    """What a file has of a layer, and the names of the tensors that say it; None if it has nothing of it.

    module: as for `layer_name`. tensors: all of the file.

    Raises ValueError if the file does not say how blocks are made: it is of an early version, whose metadata said it.
    Also if the layer's numbers are not finite, or have shapes that fit no layer.
    """
    name = layer_name(module)
    if f"{name}.q_in" not in tensors:
        return None
    marks = [mark for mark in PARAMETRIZATIONS if mark in tensors]
    if len(marks) != 1:
        raise ValueError(
            "this adapter of gsoft-diffusion does not say its parametrization in its keys and is not used: "
            "an early version wrote it; comfyui/README.md says how to write it anew"
        )
    parts = {part: tensors[f"{name}.{part}"] for part in Layer._fields[:3] if f"{name}.{part}" in tensors}
    layer = Layer(
        parts["q_in"],
        parts.get("q_out"),
        parts.get("output_scale"),
        PARAMETRIZATIONS[marks[0]],
        SHARED.search(name) is not None,
    )
    _check_numbers(name, parts)
    return layer, {*marks, *(f"{name}.{part}" for part in parts)}


def _check_numbers(name: str, parts: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the numbers of a layer are finite, and in shapes that a layer can have."""
    damaged = f"this adapter of gsoft-diffusion is damaged: {name}"
    for part, numbers in parts.items():
        shape = tuple(numbers.shape)
        if part == "output_scale":
            possible = len(shape) == 1
        else:
            possible = len(shape) == 3 and shape[0] <= MAX_FACTORS and math.comb(_side(shape[2]), 2) == shape[2]
        if not possible or numbers.numel() == 0:  # blocks of side 1 have no numbers
            raise ValueError(f"{damaged}.{part} has the impossible shape {shape}")
        if not numbers.float().isfinite().all():
            raise ValueError(f"{damaged}.{part} has values that are not finite")
    if parts.keys() >= {"q_out", "output_scale"} and _width(parts["q_out"]) != len(parts["output_scale"]):
        raise ValueError(f"{damaged} has a q_out and an output_scale of different widths")


def check_shape(layer: Layer, shape: Sequence[int]) -> None:
    """Raise ValueError unless a layer of the file is for a weight of this shape."""
    inputs = _width(layer.q_in)
    outputs = None if layer.q_out is None else _width(layer.q_out)
    if layer.output_scale is not None:
        outputs = len(layer.output_scale)
    wide = shape[-1] == inputs or (layer.first_columns and shape[-1] > inputs)
    if len(shape) != 2 or outputs not in (None, shape[0]) or not wide:
        raise ValueError(f"its shape is {tuple(shape)}, the adapter's ({outputs or 'any'}, {inputs})")


def _side(count: int) -> int:
    """The side of a skew-symmetric block with so many numbers above its diagonal."""
    return (1 + math.isqrt(1 + 8 * count)) // 2


def _width(free: Tensor) -> int:
    """The side of the rotation with learned numbers `(m, r, b(b−1)/2)`."""
    return free.shape[1] * _side(free.shape[2])


# Mathematics


def rotated_weight(weight: Tensor, layer: Layer, strength: float) -> Tensor:
    """`W'`, a new float32 tensor.

    weight: `W (out, in)`, of any dtype, on any device, also a view. layer: on any device. strength: 0 leaves W, 1 is
    what was trained. Raises ValueError if the layer is for another shape, and as `layer_blocks`.
    """
    check_shape(layer, weight.shape)
    blocks = layer_blocks(layer, strength, weight.device)
    if layer.first_columns:
        own, others = weight.float().tensor_split([_width(layer.q_in)], dim=1)
        return torch.cat([_rotated(own, blocks), others], dim=1)
    return _rotated(weight, blocks)


def rotated_outputs(
    forward: Callable[[Tensor], Tensor], x: Tensor, blocks: Blocks, first_columns: bool = False
) -> Tensor:
    """What the layer with `W'` makes of x, where only the layer itself can be called: `s·Q_out (W (Q_in x)) + bias`.

    forward: the layer with W, and a bias or none. x: `(…, in)`. blocks: on the device of x. first_columns: as in
    `Layer`: the other columns' inputs are not rotated. Returns `(…, out)` in the dtype that the layer gives.
    """
    if first_columns:
        width = blocks.q_in.shape[1:3].numel()
        own, others = x.tensor_split([width], dim=-1)
        made = rotated_outputs(lambda part: forward(F.pad(part, (0, others.shape[-1]))), own, blocks)
        return made + forward(F.pad(others, (width, 0))) - forward(torch.zeros_like(x))
    rows = x.flatten(0, -2)
    turned = rotate(blocks.q_in, rows.float().mT).mT.to(x.dtype)
    bias = forward(torch.zeros_like(rows[:1])).float()
    outputs = forward(turned.reshape(x.shape))
    rotated = _rotated_rows(blocks, (outputs.flatten(0, -2).float() - bias).mT).mT + bias
    return rotated.to(outputs.dtype).reshape(outputs.shape)


def layer_blocks(layer: Layer, strength: float, device: torch.device) -> Blocks:
    """The layer's orthogonal blocks and its scale.

    layer: on any device. strength: any finite number. device: of the results. Raises ValueError if blocks or scale are
    not finite, as float32 cannot hold what follows from huge numbers.
    """
    sides = 1 if layer.q_out is None else 2
    q_in, q_out = (
        None
        if free is None
        else orthogonal_blocks(strength * free.to(device, torch.float32), layer.parametrization, sides)
        for free in (layer.q_in, layer.q_out)
    )
    scale = layer.output_scale
    if scale is not None:
        scale = scale.to(device, torch.float32)
        scale = torch.lerp(torch.ones_like(scale), scale, strength)
    assert q_in is not None
    blocks = Blocks(q_in, q_out, scale)
    if not all(part.isfinite().all() for part in blocks if part is not None):
        raise ValueError(f"its numbers are too large to compute with at strength {strength:g}")
    return blocks


def orthogonal_blocks(free: Tensor, parametrization: str, sides: int) -> Tensor:
    """Orthogonal blocks `(m, r, b, b)`: Cayley's `(I + K)(I − K)⁻¹` or `exp(K)` of skew-symmetric K.

    free: the numbers above the diagonals of K, row by row, `(m, r, b(b−1)/2)`, float32. parametrization: of
    `PARAMETRIZATIONS`. sides: on how many sides of the weight there is a rotation.
    """
    size = _side(free.shape[-1])
    exponential = parametrization.endswith("exp")
    if parametrization.startswith("scaled_"):
        free = free * (ROW / (sides * free.shape[0] * (size - 1)) * (2 if exponential else 1))
    row, column = torch.triu_indices(size, size, offset=1, device=free.device)
    upper = free.new_zeros(*free.shape[:-1], size, size)
    upper[..., row, column] = free
    skew = upper - upper.mT
    if exponential:
        blocks = torch.matrix_exp(skew)
        return 1.5 * blocks - 0.5 * (blocks @ (blocks.mT @ blocks))  # nearer to orthogonal: a step of Newton's
    identity = torch.eye(size, device=free.device)
    matrices = (identity - skew).flatten(0, -3)
    if matrices.is_cpu and size >= BATCHED_LU_SIDE:
        inverse = torch.stack([torch.linalg.inv(matrix) for matrix in matrices])
    else:
        inverse = torch.linalg.inv(matrices)
    return 2 * inverse.reshape(skew.shape) - identity


def rotate(blocks: Tensor, x: Tensor) -> Tensor:
    """`Q x` for blocks `(m, r, b, b)` and x `(n, T)`."""
    nblocks, size = blocks.shape[1:3]
    x = x.unflatten(0, (nblocks, size))
    for index, factor in enumerate(blocks):
        x = factor @ (_shuffle(x) if index else x)
    for _ in blocks[1:]:
        x = _unshuffle(x)
    return x.flatten(0, 1)


def rotate_back(blocks: Tensor, x: Tensor) -> Tensor:
    """`Qᵀ x` for blocks `(m, r, b, b)` and x `(n, T)`."""
    nblocks, size = blocks.shape[1:3]
    x = x.unflatten(0, (nblocks, size))
    for _ in blocks[1:]:
        x = _shuffle(x)
    for index, factor in reversed(list(enumerate(blocks))):
        x = factor.mT @ x
        if index:
            x = _unshuffle(x)
    return x.flatten(0, 1)


def _rotated(weight: Tensor, blocks: Blocks) -> Tensor:
    """`diag(s) · Q_out W Q_in`, float32."""
    return _rotated_rows(blocks, rotate_back(blocks.q_in, weight.float().mT).mT)


def _rotated_rows(blocks: Blocks, x: Tensor) -> Tensor:
    """`diag(s) · Q_out x` for x `(out, T)`."""
    if blocks.q_out is not None:
        x = rotate(blocks.q_out, x)
    return x if blocks.output_scale is None else blocks.output_scale[:, None] * x


def _shuffle(x: Tensor) -> Tensor:
    """`P x`, which sends index `i` to `(i mod r)·b + ⌊i/r⌋`; x: `(r, b, T)`."""
    nblocks, size = x.shape[:2]
    return x.flatten(0, 1).unflatten(0, (size, nblocks)).transpose(0, 1)


def _unshuffle(x: Tensor) -> Tensor:
    """`Pᵀ x`; x: `(r, b, T)`."""
    nblocks, size = x.shape[:2]
    return x.transpose(0, 1).flatten(0, 1).unflatten(0, (nblocks, size))
