"""Tensors on their way into a file: rounded to its precision, which they must fit into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gsoft_diffusion.foundation.errors import UserError


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in another precision, any other as it is.

    name: for the message. tensor: the numbers. dtype: of the result. Raises UserError if a number is too large for it.
    """
    result = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not result.isfinite().all():
        wider = "bfloat16 or float32" if dtype == torch.float16 else "float32"
        raise UserError(f"{name} does not fit into {str(dtype).removeprefix('torch.')}: give --precision {wider}")
    return result


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    target: its path. tensors: by name, in any memory layout. metadata: texts by name.
    """
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata)
