"""GSOFT fine-tuning of Stable Diffusion: orthogonal adapters from group-and-shuffle matrices."""

import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError(
        "gsoft_diffusion needs Linux, macOS or, on Windows, WSL; the library gsoft and the ComfyUI nodes do not"
    )
if missing := [name for name in ("accelerate", "diffusers", "transformers", "yaml") if find_spec(name) is None]:
    raise ImportError(
        f"gsoft_diffusion needs {', '.join(missing)}, which the library gsoft alone does not; "
        'install them with: pip install "gsoft-diffusion[diffusion]"'
    )

from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.foundation import torchvision_builds  # noqa: F401 - makes torchvision importable
from gsoft_diffusion.foundation.errors import UserError

if TYPE_CHECKING:
    from gsoft.fingerprint import BaseModelIdentity
    from gsoft_diffusion.adapters.file import AdapterFile, read_adapter, save_adapter
    from gsoft_diffusion.adapters.identity import fingerprint
    from gsoft_diffusion.adapters.injection import Adapter, inject
    from gsoft_diffusion.adapters.loading import load_adapter
    from gsoft_diffusion.adapters.stack import AdapterStack

# Where bitsandbytes is installed, PEFT imports it, and it then misses a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

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

# Imported when asked for, because PyTorch and diffusers take seconds: --help and mistakes in flags need neither.
_MODULES = {
    "Adapter": "adapters.injection",
    "AdapterFile": "adapters.file",
    "AdapterStack": "adapters.stack",
    "BaseModelIdentity": "adapters.identity",
    "fingerprint": "adapters.identity",
    "inject": "adapters.injection",
    "load_adapter": "adapters.loading",
    "read_adapter": "adapters.file",
    "save_adapter": "adapters.file",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
