"""Importing this makes a torchvision importable that was built for another PyTorch than the one installed.

Beside a CPU build of PyTorch, pip installs PyPI's torchvision, which is built for CUDA. It leaves its compiled part out
then, and its import fails (with it those of diffusers and open_clip) only because two operators of object detection are
unknown. Nothing here calls them: it is enough to declare them, when torchvision is about to be imported.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def mismatched(torch_version: str | None, torchvision_version: str | None) -> bool:
    """Whether a CPU build of PyTorch has a torchvision beside it that is none.

    torch_version, torchvision_version: of the packages as installed; None for one that is not.
    """
    if torch_version is None or torchvision_version is None:
        return False
    return "+cpu" in torch_version and "+cpu" not in torchvision_version


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class _Declaring(MetaPathFinder):
    """Finds nothing: it is asked before torchvision is found, and declares the operators."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch  # not before it is needed: it takes seconds

            self.library = torch.library.Library("torchvision", "FRAGMENT")  # kept: with it go what it declared
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if mismatched(_installed("torch"), _installed("torchvision")):
    declaring = _Declaring()
    sys.meta_path.insert(0, declaring)
