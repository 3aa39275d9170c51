"""The node pack's mathematics against our own `W'`."""

from __future__ import annotations

import ast
import re
import sys
from itertools import product
from typing import get_args

import pytest
import torch
from comfyui_pack import PACK, WIDTHS, learned, own_weight
from torch import Tensor
from torch.nn import functional as F

from gsoft.config import Parametrization, RotationConfig
from gsoft_diffusion.publish.layer_names import module_path

STRENGTHS = (-0.5, 0.0, 0.5, 1.0, 1.7)


def layer_of(rotation, config: RotationConfig, numbers: dict[str, Tensor]):
    parts = (numbers.get(name) for name in ("q_in", "q_out", "output_scale"))
    return rotation.Layer(*parts, config.parametrization)


def file_of_a_layer() -> dict[str, Tensor]:
    numbers = {f"unet.a.to_q.{part}": tensor for part, tensor in learned(RotationConfig(nblocks=4)).items()}
    return {"parametrization.scaled_cayley": torch.empty(0), **numbers}


CONFIGS = [
    RotationConfig(nblocks=nblocks, nfactors=nfactors, double=double, parametrization=name, output_scale=scale)
    for name, double, scale, (nblocks, nfactors) in product(
        get_args(Parametrization), (True, False), (True, False), ((4, 2), (8, "dense"), (2, 1), (8, 3))
    )
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_weights_are_ours(rotation, config):
    numbers = learned(config)
    weight = torch.randn(WIDTHS[::-1], generator=torch.Generator().manual_seed(1))
    layer = layer_of(rotation, config, numbers)
    for strength in STRENGTHS:
        wanted = own_weight(config, numbers, weight, strength)
        torch.testing.assert_close(rotation.rotated_weight(weight, layer, strength), wanted, atol=3e-6, rtol=0)
    assert (wanted - weight).abs().max() > 0.1
    assert torch.equal(rotation.rotated_weight(weight, layer, 0.0), weight)


@pytest.mark.parametrize("parametrization", ["cayley", "exp"])
def test_large_blocks_are_rotations_with_many_threads(rotation, parametrization):
    """PyTorch's batched LU is wrong for them: see BATCHED_LU_SIDE."""
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        free = 0.3 * torch.randn(1, 16, 160 * 159 // 2, generator=torch.Generator().manual_seed(0))
        blocks = rotation.orthogonal_blocks(free, parametrization, sides=1)
    finally:
        torch.set_num_threads(threads)
    assert (blocks.mT @ blocks - torch.eye(160)).abs().max() < 2e-5


def test_part_of_a_fused_matrix(rotation):
    config = RotationConfig(nblocks=4)
    numbers, fused = learned(config), torch.randn(120, 24, generator=torch.Generator().manual_seed(1))
    view = fused.narrow(0, 40, 40)
    found = rotation.rotated_weight(view, layer_of(rotation, config, numbers), 1.0)
    torch.testing.assert_close(found, own_weight(config, numbers, view, 1.0), atol=3e-6, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_the_first_columns_of_a_fused_matrix(rotation, bias):
    """As in FLUX.2's single-stream blocks, where the feed-forward layer has the others."""
    config = RotationConfig(nblocks=4)
    numbers = learned(config)
    name = "transformer.single_transformer_blocks.3.attn.to_out"
    file = {f"{name}.{part}": tensor for part, tensor in numbers.items()}
    file[f"parametrization.{config.parametrization}"] = torch.empty(0)
    layer, keys = rotation.find_layer(name, file)
    assert keys == file.keys()
    fused = torch.nn.Linear(24 + 32, 40, bias=bias).requires_grad_(False)
    found = rotation.rotated_weight(fused.weight, layer, 0.5)
    torch.testing.assert_close(found[:, :24], own_weight(config, numbers, fused.weight[:, :24], 0.5), atol=3e-6, rtol=0)
    assert torch.equal(found[:, 24:], fused.weight[:, 24:])
    x = torch.randn(2, 3, 56, generator=torch.Generator().manual_seed(1))
    blocks = rotation.layer_blocks(layer, 0.5, x.device)
    outputs = rotation.rotated_outputs(fused, x, blocks, layer.first_columns)
    torch.testing.assert_close(outputs, F.linear(x, found, fused.bias), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"its shape is .*, the adapter's \(40, 24\)"):
        rotation.rotated_weight(torch.zeros(40, 20), layer, 1.0)
    other, _ = rotation.find_layer(
        "transformer.a.to_out", {k.replace(name, "transformer.a.to_out"): v for k, v in file.items()}
    )
    with pytest.raises(ValueError, match=r"its shape is .*, the adapter's \(40, 24\)"):
        rotation.rotated_weight(fused.weight, other, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(rotation, dtype):
    config = RotationConfig(nblocks=4)
    numbers, weight = learned(config), torch.randn(WIDTHS[::-1]).to(dtype)
    found = rotation.rotated_weight(weight, layer_of(rotation, config, numbers), 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, own_weight(config, numbers, weight.float(), 0.5), atol=3e-6, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", CONFIGS[::5], ids=str)
def test_outputs_without_the_weight(rotation, config, bias):
    numbers, generator = learned(config), torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(*WIDTHS, bias=bias).requires_grad_(False)
    x = torch.randn(2, 3, WIDTHS[0], generator=generator)
    for strength in (0.5, 1.0):
        blocks = rotation.layer_blocks(layer_of(rotation, config, numbers), strength, x.device)
        wanted = F.linear(x, own_weight(config, numbers, linear.weight, strength), linear.bias)
        torch.testing.assert_close(rotation.rotated_outputs(linear, x, blocks), wanted, atol=1e-5, rtol=0)
    half = rotation.rotated_outputs(linear.half(), x.half(), blocks)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), wanted, atol=2e-2, rtol=0)


NAMES = [
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_out",
    "transformer.transformer_blocks.3.attn.add_k_proj",
    "transformer.transformer_blocks.3.attn.to_add_out",
    "transformer.transformer_blocks.0.attn2.to_out",
    "transformer.single_transformer_blocks.37.attn.to_v",
    "transformer.single_transformer_blocks.37.attn.to_out",
    "text_encoder.layers.11.q_proj",
    "text_encoder_2.layers.31.out_proj",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_layers(rotation, name):
    """As exported LoRAs call them, and as ComfyUI does: with `.processor`, without `.0`."""
    assert rotation.layer_name(module_path(name)) == name
    if name.startswith("unet."):
        assert rotation.layer_name(name.replace(".to_", ".processor.to_")) == name


@pytest.mark.parametrize("marks", [(), ("cayley", "exp")])
def test_a_file_that_does_not_say_its_parametrization_is_not_used(rotation, marks):
    tensors = {"unet.a.to_q.q_in": torch.zeros(2, 4, 15)}
    tensors |= {f"parametrization.{name}": torch.empty(0) for name in marks}
    assert rotation.find_layer("unet.b.to_q", tensors) is None
    with pytest.raises(ValueError, match="does not say its parametrization in its keys"):
        rotation.find_layer("unet.a.to_q", tensors)


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("q_in", (1_000_000_000, 24, 0)),  # blocks of side 1: no data
        ("q_in", (33, 4, 15)),
        ("q_in", (0, 4, 15)),
        ("q_in", (2, 0, 15)),
        ("q_in", (2, 4, 14)),
        ("q_out", (2, 60)),
        ("output_scale", (40, 1)),
        ("output_scale", (0,)),
    ],
)
def test_numbers_in_impossible_shapes_are_refused(rotation, part, shape):
    message = rf"is damaged: unet\.a\.to_q\.{part} has the impossible shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        rotation.find_layer("unet.a.to_q", file_of_a_layer() | {f"unet.a.to_q.{part}": torch.zeros(shape)})


@pytest.mark.parametrize("part", ["q_in", "q_out", "output_scale"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(rotation, part, value):
    file = file_of_a_layer()
    file[f"unet.a.to_q.{part}"].flatten()[-1] = value
    with pytest.raises(ValueError, match=rf"unet\.a\.to_q\.{part} has values that are not finite"):
        rotation.find_layer("unet.a.to_q", file)


def test_a_scale_of_another_width_is_refused(rotation):
    with pytest.raises(ValueError, match=r"unet\.a\.to_q has a q_out and an output_scale of different widths"):
        rotation.find_layer("unet.a.to_q", file_of_a_layer() | {"unet.a.to_q.output_scale": torch.ones(1)})


def test_a_layer_of_another_shape_is_refused_before_blocks_are_made(rotation, monkeypatch):
    monkeypatch.setattr(rotation, "layer_blocks", lambda *_: pytest.fail("made blocks"))
    layer, _ = rotation.find_layer("unet.a.to_q", file_of_a_layer())
    with pytest.raises(ValueError, match="its shape is"):
        rotation.rotated_weight(torch.zeros(40, 25), layer, 1.0)


@pytest.mark.parametrize("shape", [(40, 25), (41, 24), (24, 40), (40, 24, 1)])
def test_a_weight_of_another_shape_is_refused(rotation, shape):
    config = RotationConfig(nblocks=4)
    with pytest.raises(ValueError, match=r"its shape is .*, the adapter's \(40, 24\)"):
        rotation.rotated_weight(torch.zeros(shape), layer_of(rotation, config, learned(config)), 1.0)


def test_the_mathematics_need_pytorch_only():
    tree = ast.parse((PACK / "rotation.py").read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in modules} <= {"torch", *sys.stdlib_module_names}
