"""The extension for Forge, called as Forge calls it, beside a stand-in for its LoRA code."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui_pack import PACK, WIDTHS, learned, load, own_weight
from torch import Tensor

from gsoft.config import RotationConfig

CONFIG = RotationConfig(nblocks=4, parametrization="exp")
UNET, TEXT = "unet.mid_block.processor.to_q", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SCRIPT = PACK / "scripts" / "gsoft_forge.py"


@pytest.fixture
def forge(monkeypatch) -> Any:
    """A stand-in for `backend.patcher.lora`, whose own loader uses nothing, with the extension in it."""
    lora: Any = ModuleType("backend.patcher.lora")
    lora.extra_weight_calculators, lora.lora_collection_priority = {}, [ModuleType("forge's own")]
    lora.lora_collection_priority[0].load_lora = lambda file, to_load: ({"own": True}, file)
    lora.get_function = lambda name: next(
        getattr(found, name) for found in lora.lora_collection_priority if hasattr(found, name)
    )
    for name in ("backend", "backend.patcher"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "backend.patcher.lora", lora)
    sys.modules["backend"].patcher = sys.modules["backend.patcher"]
    sys.modules["backend.patcher"].lora = lora
    load("gsoft_forge", SCRIPT)
    return lora


def file() -> dict[str, Tensor]:
    layers = {
        f"{layer}.{name}": x
        for layer in ("unet.mid_block.to_q", "text_encoder.layers.0.q_proj")
        for name, x in learned(CONFIG).items()
    }
    return {"parametrization.exp": torch.empty(0), **layers}


def test_the_script_registers_once(forge):
    load("gsoft_forge_again", SCRIPT)
    assert len(forge.lora_collection_priority) == 2
    assert list(forge.extra_weight_calculators) == ["gsoft"]


def test_denoiser_and_text_encoder_take_the_whole_file_between_them(forge):
    load_lora = forge.get_function("load_lora")
    patches, left = load_lora(file(), {UNET: "unet.weight"})
    assert list(patches) == ["unet.weight"]
    assert "parametrization.exp" in left  # the text encoder needs it
    patches, left = load_lora(left, {TEXT: ("text.weight", (0, 0, 40))})
    assert list(patches) == [("text.weight", (0, 0, 40))]
    assert not left


def test_other_files_are_left_to_forge(forge):
    assert forge.get_function("load_lora")({"a.lora_up.weight": 1}, {}) == ({"own": True}, {"a.lora_up.weight": 1})


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_part_of_a_fused_matrix_is_turned_in_place(forge, strength):
    patches, _ = forge.get_function("load_lora")(file(), {UNET: "unet.weight"})
    kind, layer = patches["unet.weight"]
    weight = torch.randn(WIDTHS[::-1], generator=torch.Generator().manual_seed(1))
    fused = torch.cat([weight, weight])
    forge.extra_weight_calculators[kind](fused.narrow(0, 40, 40), strength, layer)
    torch.testing.assert_close(fused[40:], own_weight(CONFIG, learned(CONFIG), weight, strength), atol=3e-6, rtol=0)
    assert torch.equal(fused[:40], weight)


def test_a_weight_that_does_not_fit_stays_as_it_is_and_that_is_said(forge, capsys):
    """Forge has nothing around the call that would go on with its picture."""
    patches, _ = forge.get_function("load_lora")(file(), {UNET: "unet.weight"})
    kind, patch = patches["unet.weight"]
    weight = torch.ones(40, 32)
    assert forge.extra_weight_calculators[kind](weight, 1.0, patch) is weight
    assert (weight == 1).all()
    said = f"[LORA] {UNET} stays as it is: its shape is (40, 32), the adapter's (40, 24)\n"
    assert capsys.readouterr().out == said


def test_a_damaged_file_is_not_used_and_that_is_said(forge, capsys):
    damaged = file() | {"unet.mid_block.to_q.q_in": torch.zeros(1_000_000_000, 24, 0)}
    assert forge.get_function("load_lora")(damaged, {UNET: "unet.weight"}) == ({}, damaged)
    assert "unet.mid_block.to_q.q_in has the impossible shape (1000000000, 24, 0)" in capsys.readouterr().out


def test_a_file_of_an_early_version_is_not_used_and_that_is_said(forge, capsys):
    old = {name: tensor for name, tensor in file().items() if not name.startswith("parametrization.")}
    assert forge.get_function("load_lora")(old, {UNET: "unet.weight"}) == ({}, old)
    assert "does not say its parametrization in its keys" in capsys.readouterr().out
