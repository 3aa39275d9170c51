"""Importing this makes a torchvision importable that was built for another PyTorch than the one installed.

Beside a CPU build of PyTorch, pip installs PyPI's torchvision, which is built for CUDA. It leaves its compiled part out
then, and its import fails (with it those of diffusers and open_clip) only because two operators of object detection are
unknown. Nothing here calls them: it is enough to declare them, before anything imports torchvision.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def mismatched(torch_version: str, torchvision_version: str | None) -> bool:
    """Whether a CPU build of PyTorch has a torchvision beside it that is none."""
    return torchvision_version is not None and "+cpu" in torch_version and "+cpu" not in torchvision_version


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if mismatched(torch.__version__, _installed("torchvision")):
    _library = torch.library.Library("torchvision", "FRAGMENT")  # kept: operators are gone with what declared them
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
