"""Forge's own LoRA code reads our adapter's file, with this folder among its extensions.

FORGE=~/stable-diffusion-webui-forge python -m pytest tests/comfyui/test_real_forge.py    # with its requirements
"""

from __future__ import annotations

import os
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_pack import PACK, close, close_in_half, load
from other_programs import STRUCTURES, Tensors, Trained
from safetensors.torch import load_file
from torch import nn

from gsoft.submodules import add_submodule

pytestmark = pytest.mark.skipif("FORGE" not in os.environ, reason="FORGE names no checkout of Forge")

# What Forge knows of the models beside their weights.
CONFIGS: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    },
    "SDXL": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 3, 3],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
        "transformer_depth_middle": 3,
    },
    "FLUX.1": {"depth": 2, "depth_single_blocks": 2, "hidden_size": 128},
}


@cache
def forge() -> SimpleNamespace:
    """Forge's modules, after it has run the extension's script: twice, as when its page is reloaded."""
    sys.path.append(os.environ["FORGE"])
    arguments, sys.argv = sys.argv, ["forge", *([] if torch.cuda.is_available() else ["--always-cpu"])]
    try:
        import backend.patcher.base as base
        import backend.patcher.lora as lora
    finally:
        sys.argv = arguments
    for name in ("gsoft_forge", "gsoft_forge_again"):
        load(name, PACK / "scripts" / "gsoft_forge.py")
    assert len(lora.lora_collection_priority) == 3
    return SimpleNamespace(base=base, lora=lora)


def model_of(tensors: Tensors) -> nn.Module:
    """A model with these weights and nothing else."""
    model = nn.Module()
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if path not in dict(model.named_modules()):
            add_submodule(model, path, nn.Module())
        model.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    return model


def patched(trained: Trained, config: dict[str, Any], strength: float) -> tuple[Tensors, Tensors]:
    """Forge's weights after it has loaded the file, by its own steps, and what of the file it did not use."""
    denoiser = model_of({f"diffusion_model.{name}": tensor for name, tensor in trained.names().items()})
    denoiser.diffusion_model.config = config
    denoiser.config = SimpleNamespace(huggingface_repo="black-forest-labs/FLUX.1-dev" if "depth" in config else "sd")
    clip, left = model_of(trained.clip_names()), load_file(trained.file)
    tensors: Tensors = {}
    for model, keys in ((denoiser, forge().lora.model_lora_keys_unet), (clip, forge().lora.model_lora_keys_clip)):
        patches, left = forge().lora.load_lora(left, keys(model, {}))
        place = torch.device("cpu")
        patcher = forge().base.ModelPatcher(model, load_device=place, offload_device=place)
        assert patcher.add_patches(filename="dog", patches=patches, strength_patch=strength) == set(patches)
        patcher.refresh_loras()
        tensors |= {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return tensors, left


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_ours(name, dtype, strength, tmp_path):
    trained = Trained(STRUCTURES[name], dtype, tmp_path)
    found, left = patched(trained, CONFIGS[name], strength)
    assert not left
    trained.check(found, strength, close if dtype == torch.float32 else close_in_half)


def test_other_files_are_left_to_forge():
    up, down = torch.randn(32, 2), torch.randn(2, 32)
    lora = {"lora_unet_x.lora_up.weight": up, "lora_unet_x.lora_down.weight": down}
    forge()
    patches, left = forge().lora.load_lora(lora, {"lora_unet_x": "diffusion_model.x.weight"})
    assert patches["diffusion_model.x.weight"][0] == "lora"
    assert not left


def test_a_file_of_an_early_version_is_not_used(tmp_path, capsys):
    file = {"unet.x.to_q.q_in": torch.zeros(2, 4, 6)}
    forge()
    patches, left = forge().lora.load_lora(file, {"unet.x.processor.to_q": "diffusion_model.x.weight"})
    assert (patches, left) == ({}, file)
    assert "does not say its parametrization" in capsys.readouterr().out
