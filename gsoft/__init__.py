"""Group-and-shuffle orthogonal matrices for PyTorch: adapters that rotate a model's weights, and orthogonal layers.

Gorbunov, Yudin, Soboleva, Alanov, Naumov, Rakhuba: Group and Shuffle: Efficient Structured Orthogonal Parametrization,
NeurIPS 2024, arXiv 2406.10019. Needs PyTorch, NumPy and safetensors, and knows nothing of any kind of model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gsoft.config import Config, RotationConfig
from gsoft.errors import ConfigError, FileError, GSOFTError

if TYPE_CHECKING:
    from gsoft.adapter import Adapter
    from gsoft.convolution import GSConv2d, SOCConv2d, plain_copy
    from gsoft.exponential import truncation_error
    from gsoft.fingerprint import BaseModelIdentity
    from gsoft.lipschitz import MaxMin, certified_radius, lipschitz_bound
    from gsoft.model_adapter import ModelAdapter, inject
    from gsoft.parametrizations import OrthogonalLinear, orthogonal
    from gsoft.saving import AdapterFile, load, read, save
    from gsoft.shuffles import channel_shuffle
    from gsoft.stack import AdapterStack

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterStack",
    "BaseModelIdentity",
    "Config",
    "ConfigError",
    "FileError",
    "GSConv2d",
    "GSOFTError",
    "MaxMin",
    "ModelAdapter",
    "OrthogonalLinear",
    "RotationConfig",
    "SOCConv2d",
    "certified_radius",
    "channel_shuffle",
    "inject",
    "lipschitz_bound",
    "load",
    "orthogonal",
    "plain_copy",
    "read",
    "save",
    "truncation_error",
]

# Imported when asked for, because PyTorch takes seconds: configurations and errors do not need it. No module has the
# name of a function here, or importing it would hide the function.
_MODULES = {
    "Adapter": "adapter",
    "AdapterFile": "saving",
    "AdapterStack": "stack",
    "BaseModelIdentity": "fingerprint",
    "GSConv2d": "convolution",
    "MaxMin": "lipschitz",
    "ModelAdapter": "model_adapter",
    "OrthogonalLinear": "parametrizations",
    "SOCConv2d": "convolution",
    "certified_radius": "lipschitz",
    "channel_shuffle": "shuffles",
    "inject": "model_adapter",
    "lipschitz_bound": "lipschitz",
    "load": "saving",
    "orthogonal": "parametrizations",
    "plain_copy": "convolution",
    "read": "saving",
    "save": "saving",
    "truncation_error": "exponential",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
