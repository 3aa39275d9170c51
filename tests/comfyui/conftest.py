"""The node pack, loaded as ComfyUI loads it: from a path, with ComfyUI's modules beside it, or stand-ins for them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from comfyui_pack import PACK, load


class WeightAdapterBase:
    """What ComfyUI's class of this name has that the pack relies on."""

    multiplier = 1.0


@pytest.fixture
def comfy(monkeypatch) -> ModuleType:
    """A stand-in for `comfy.weight_adapter`, with no adapters in its list."""
    modules: dict[str, Any] = {name: ModuleType(name) for name in ("comfy", "comfy.weight_adapter")}
    modules["comfy.weight_adapter.base"] = ModuleType("comfy.weight_adapter.base")
    modules["comfy"].weight_adapter = modules["comfy.weight_adapter"]
    modules["comfy.weight_adapter"].adapters = []
    modules["comfy.weight_adapter.base"].WeightAdapterBase = WeightAdapterBase
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["comfy.weight_adapter"]


@pytest.fixture
def pack(comfy, monkeypatch) -> ModuleType:
    """The node pack beside the stand-in."""
    name = "custom_nodes_gsoft"
    for module in (name, f"{name}.rotation", f"{name}.weight_adapter"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return load(name, PACK / "__init__.py")


@pytest.fixture(scope="session")
def rotation() -> ModuleType:
    """The mathematics alone."""
    return load("gsoft_rotation", PACK / "rotation.py")
