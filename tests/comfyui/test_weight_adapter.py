"""The class that ComfyUI's loaders use, called as they call it, beside a stand-in for their package."""

from __future__ import annotations

import logging
from typing import get_args

import pytest
import torch
from comfyui_pack import PACK, WIDTHS, close_in_half, learned, load, own_weight
from torch import Tensor
from torch.nn import functional as F

from gsoft.config import Parametrization, RotationConfig

CONFIG = RotationConfig(nblocks=4)
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out"
MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out"  # ComfyUI's name for it


def adapter_file(numbers: dict[str, Tensor], parametrization: str = "scaled_cayley") -> dict[str, Tensor]:
    """A file's tensors: one layer of the UNet, one of a text encoder."""
    layers = {
        f"{layer}.{name}": tensor
        for layer in (LAYER, "text_encoder.layers.0.q_proj")
        for name, tensor in numbers.items()
    }
    return {f"parametrization.{parametrization}": torch.empty(0), **layers}


def identity(tensor: Tensor) -> Tensor:
    return tensor


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(WIDTHS[::-1], generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def adapter(pack, comfy):
    """The one layer's, as the loader gets it."""
    return comfy.adapters[0].load(MODULE, adapter_file(learned(CONFIG)), None, None, set())


def test_the_pack_has_no_nodes_and_registers_once(pack, comfy):
    assert pack.NODE_CLASS_MAPPINGS == {}
    load("custom_nodes_gsoft_again", PACK / "__init__.py")
    assert [kind.__name__ for kind in comfy.adapters] == ["GSOFTAdapter"]


def test_all_keys_of_the_file_are_used(pack, comfy):
    file, loaded = adapter_file(learned(CONFIG)), set()
    names = [MODULE, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "unet.mid_block.x", "lora_unet_mid"]
    found = [comfy.adapters[0].load(name, file, None, None, loaded) for name in names]
    assert [adapter is not None for adapter in found] == [True, True, False, False]
    assert loaded == file.keys()
    assert found[0].loaded_keys < loaded
    assert found[0].name == "gsoft"


@pytest.mark.parametrize("parametrization", get_args(Parametrization))
@pytest.mark.parametrize("strength", [-0.5, 0.5, 1.0, 1.7])
def test_the_weight_is_turned_in_place(pack, comfy, parametrization, strength):
    numbers, turned = learned(CONFIG), weight()
    adapter = comfy.adapters[0].load(MODULE, adapter_file(numbers, parametrization), None, None, set())
    result = adapter.calculate_weight(turned, "key", strength, 1.0, None, identity, torch.float32, None)
    assert result is turned
    config = RotationConfig(nblocks=4, parametrization=parametrization)
    torch.testing.assert_close(turned, own_weight(config, numbers, weight(), strength), atol=3e-6, rtol=0)


def test_a_part_of_a_fused_matrix_is_turned_in_place(adapter):
    fused = torch.cat([torch.ones(40, 24), weight(), torch.ones(40, 24)])
    adapter.calculate_weight(fused.narrow(0, 40, 40), "key", 1.0, 1.0, (0, 40, 40), identity)
    torch.testing.assert_close(fused[40:80], own_weight(CONFIG, learned(CONFIG), weight(), 1.0), atol=3e-6, rtol=0)
    assert (fused[:40] == 1).all()
    assert (fused[80:] == 1).all()


def test_half_precision_differs_by_one_unit_in_the_last_place_at_most(adapter):
    turned = weight(torch.float16)
    adapter.calculate_weight(turned, "key", 1.0, 1.0, None, identity, torch.float16)
    wanted = own_weight(CONFIG, learned(CONFIG), weight(torch.float16).float(), 1.0).half()
    assert close_in_half(turned, wanted)


def test_adapters_act_in_their_order(pack, comfy):
    one, other = learned(CONFIG), learned(CONFIG, seed=1)
    turned = weight()
    for numbers, strength in ((one, 1.0), (other, 0.5)):
        adapter = comfy.adapters[0].load(MODULE, adapter_file(numbers), None, None, set())
        adapter.calculate_weight(turned, "key", strength, 1.0, None, identity)
    wanted = own_weight(CONFIG, other, own_weight(CONFIG, one, weight(), 1.0), 0.5)
    torch.testing.assert_close(turned, wanted, atol=5e-6, rtol=0)


def test_a_function_acts_on_the_change(adapter):
    """As ComfyUI's, which move what is added to other places of the weight."""
    turned = weight()
    adapter.calculate_weight(turned, "key", 1.0, 1.0, None, lambda change: change.flip(0))
    change = own_weight(CONFIG, learned(CONFIG), weight(), 1.0) - weight()
    torch.testing.assert_close(turned, weight() + change.flip(0), atol=3e-6, rtol=0)


def test_what_comfyui_copies_and_rounds_is_computed_exactly(adapter):
    """Its prefetching makes the adapter anew from copies; its bypass loader rounds `weights` to the model's dtype."""
    again = type(adapter)(
        adapter.loaded_keys, tuple(w.clone() if isinstance(w, Tensor) else w for w in adapter.weights)
    )
    again.weights = tuple(w.half() if isinstance(w, Tensor) else w for w in again.weights)
    turned, wanted = weight(), weight()
    again.calculate_weight(turned, "key", 1.0, 1.0, None, identity)
    adapter.calculate_weight(wanted, "key", 1.0, 1.0, None, identity)
    assert torch.equal(turned, wanted)


def test_errors_are_logged_and_the_weight_stays(adapter, caplog):
    turned = torch.ones(7, 5)
    with caplog.at_level(logging.ERROR):
        result = adapter.calculate_weight(turned, "some.key", 1.0, 1.0, None, identity)
    assert result is turned
    assert (turned == 1).all()
    assert caplog.messages == ["gsoft: some.key stays as it is: its shape is (7, 5), the adapter's (40, 24)"]


@pytest.mark.parametrize("part", ["q_in", "output_scale"])
def test_numbers_that_are_too_large_to_compute_with_leave_the_layer_as_it_is(pack, comfy, caplog, part):
    """Not black pictures: float32 has no room for what follows from them."""
    numbers = learned(CONFIG)
    numbers[part].fill_(3e38)
    adapter = comfy.adapters[0].load(MODULE, adapter_file(numbers), None, None, set())
    turned, linear, x = weight(), torch.nn.Linear(*WIDTHS), torch.randn(3, WIDTHS[0])
    adapter.multiplier = 1.5
    with caplog.at_level(logging.ERROR):
        adapter.calculate_weight(turned, "some.key", 1.5, 1.0, None, identity)
        assert torch.equal(adapter.bypass_forward(linear.forward, x), linear(x))
    assert torch.equal(turned, weight())
    said = "stays as it is: its numbers are too large to compute with at strength 1.5"
    assert caplog.messages == [f"gsoft: some.key {said}", f"gsoft: {LAYER} {said}"]


def test_comfyui_is_told_that_memory_is_full(adapter, pack, monkeypatch):
    """Otherwise its picture would have some of the layers only."""

    def full(*_):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(pack.weight_adapter, "rotated_weight", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="full"):
        adapter.calculate_weight(weight(), "key", 1.0, 1.0, None, identity)


def test_a_file_of_an_early_version_is_not_used_and_that_is_said_once(pack, comfy, caplog):
    file = adapter_file(learned(CONFIG))
    del file["parametrization.scaled_cayley"]
    loaded: set[str] = set()
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert comfy.adapters[0].load(MODULE, file, None, None, loaded) is None
    (message,) = caplog.messages
    assert "an early version wrote it; comfyui/README.md says how to write it anew" in message
    assert not loaded


@pytest.mark.parametrize("bias", [True, False])
def test_the_bypass_loader_leaves_the_weight_alone(adapter, bias):
    linear = torch.nn.Linear(*WIDTHS, bias=bias).requires_grad_(False)
    before, x = linear.weight.clone(), torch.randn(2, 3, WIDTHS[0])
    for adapter.multiplier in (1.0, 0.5):
        wanted = F.linear(x, own_weight(CONFIG, learned(CONFIG), linear.weight, adapter.multiplier), linear.bias)
        torch.testing.assert_close(adapter.bypass_forward(linear.forward, x), wanted, atol=1e-5, rtol=0)
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("widths", [(25, 40), (24, 41), (24, 1)])
def test_the_bypass_loader_leaves_a_layer_that_does_not_fit_as_it_is(pack, comfy, caplog, widths):
    numbers = learned(RotationConfig(nblocks=4, double=False))
    adapter = comfy.adapters[0].load(MODULE, adapter_file(numbers), None, None, set())
    linear, x = torch.nn.Linear(*widths), torch.randn(2, 3, widths[0])
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert torch.equal(adapter.bypass_forward(linear.forward, x), linear(x))
    assert caplog.messages == [f"gsoft: {LAYER} stays as it is: its shape is {widths[::-1]}, the adapter's (40, 24)"]


def test_a_layer_with_damaged_numbers_is_not_used_and_that_is_said(pack, comfy, caplog):
    file = adapter_file(learned(CONFIG))
    file[f"{LAYER}.q_in"][0, 0, 0] = torch.nan
    with caplog.at_level(logging.ERROR):
        assert comfy.adapters[0].load(MODULE, file, None, None, set()) is None
    assert caplog.messages == [
        f"gsoft: this adapter of gsoft-diffusion is damaged: {LAYER}.q_in has values that are not finite"
    ]
