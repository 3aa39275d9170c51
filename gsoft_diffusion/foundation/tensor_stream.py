"""safetensors files that are written tensor by tensor: of a large one, only one tensor need be in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNMENT = 8  # of the first tensor, in bytes


class TensorStream:
    """A safetensors file of which the shapes are known and the numbers come one tensor at a time.

    size: of the file, in bytes.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """shapes: of all tensors by name, in the order in which they will come. dtype: of all, one of `DTYPES`.
        metadata: texts by name.
        """
        self._shapes, self._dtype = dict(shapes), dtype
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + end

    def write(self, path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write the file.

        path: where to. tensors: names and numbers, as announced. Raises OSError if it cannot be written.
        """
        with path.open("wb") as file:
            file.write(self._header)
            for (name, tensor), (wanted, shape) in zip(tensors, self._shapes.items(), strict=True):
                assert (name, tuple(tensor.shape), tensor.dtype) == (wanted, shape, self._dtype), name
                numbers = tensor.detach().cpu().contiguous().flatten()
                file.write(numbers.view(torch.uint8).numpy().data)  # NumPy knows no bfloat16, but its bytes
