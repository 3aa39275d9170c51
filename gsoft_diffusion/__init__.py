"""GSOFT fine-tuning of Stable Diffusion: orthogonal adapters from group-and-shuffle matrices."""

from gsoft_diffusion import torchvision_builds  # noqa: F401 # isort: skip - before anything imports torchvision
from gsoft_diffusion.adapter_file import (
    AdapterFile,
    BaseModelIdentity,
    fingerprint,
    load_adapter,
    read_adapter,
    save_adapter,
)
from gsoft_diffusion.adapter_stack import AdapterStack
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.inject import Adapter, inject

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterFile",
    "AdapterStack",
    "BaseModelIdentity",
    "UserError",
    "__version__",
    "fingerprint",
    "inject",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]
