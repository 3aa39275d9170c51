"""With this folder among Forge's extensions, its LoRA loader reads adapters of gsoft-diffusion. See ../README.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import backend.patcher.lora as forge
from torch import Tensor

NAME = "gsoft"


def _rotation() -> ModuleType:
    """The mathematics, one folder up: Forge loads scripts by their paths, outside of any package."""
    path = Path(__file__).resolve().parent.parent / "rotation.py"
    spec = importlib.util.spec_from_file_location("gsoft_rotation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rotation = _rotation()


def load_lora(lora: Mapping[str, Tensor], to_load: Mapping[str, Any]) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """Patches for the layers of a model, and what of the file is left over; other files are left to Forge.

    lora: tensors by name. to_load: what Forge calls the model's layers.

    Forge asks first for the denoiser's layers and then, with what is left over, for the text encoders'. So what both
    need stays there until the second time.
    """
    if not any(name.endswith(".q_in") for name in lora):
        return load_others(lora, to_load)
    patches: dict[Any, Any] = {}
    used: set[str] = set()
    try:
        for module, target in to_load.items():
            if found := rotation.find_layer(module, lora):
                layer, keys = found
                patches[target] = (NAME, (module, layer))
                used |= keys
    except ValueError as error:
        print(f"[LORA] {error}")
        return {}, dict(lora)
    if any(name.endswith(".q_in") for name in lora.keys() - used):
        used -= rotation.PARAMETRIZATIONS.keys()
    return patches, {name: tensor for name, tensor in lora.items() if name not in used}


def calculate_weight(weight: Tensor, strength: float, patch: tuple[str, Any]) -> Tensor:
    """Turn the weight, in place: it may be a part of a fused matrix. Where it does not fit it stays, which is printed.

    weight: `(out, in)`. strength: 1 is what was trained. patch: what Forge calls the layer, and `find_layer`'s `Layer`.
    """
    module, layer = patch
    try:
        return weight.copy_(rotation.rotated_weight(weight, layer, strength))
    except ValueError as error:  # Forge tries once more after others, with more memory free
        print(f"[LORA] {module} stays as it is: {error}")
        return weight


if NAME not in forge.extra_weight_calculators:  # Forge loads scripts again when its page is reloaded
    load_others = forge.get_function("load_lora")
    forge.lora_collection_priority.insert(0, SimpleNamespace(load_lora=load_lora))
    forge.extra_weight_calculators[NAME] = calculate_weight
