"""What is written tensor by tensor is what safetensors reads."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gsoft_diffusion.foundation.tensor_stream import TensorStream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_safetensors_reads_it(tmp_path, dtype):
    tensors = {
        "b.diff": torch.randn(3, 5, dtype=dtype).mT,
        "a": torch.randn(7, dtype=dtype),
        "ä": torch.randn(2, 1).to(dtype),
        "one": torch.tensor(3.25, dtype=dtype),
    }
    stream = TensorStream({name: tuple(x.shape) for name, x in tensors.items()}, dtype, {"format": "pt", "who": "“we”"})
    path = tmp_path / "x.safetensors"
    stream.write(path, tensors.items())
    assert path.stat().st_size == stream.size
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "“we”"}


def test_tensors_are_not_kept(tmp_path):
    """The one that is written, and the one that is made meanwhile."""
    written: list[weakref.ref] = []

    def make():
        for number in range(5):
            tensor = torch.full((100,), float(number))
            written.append(weakref.ref(tensor))
            yield str(number), tensor
            del tensor
            assert sum(one() is not None for one in written) <= 1

    TensorStream({str(number): (100,) for number in range(5)}, torch.float32, {}).write(tmp_path / "x", make())
    assert len(written) == 5


def test_other_tensors_than_announced_are_an_error(tmp_path):
    for given in ([], [("a", torch.ones(3))], [("a", torch.ones(2).half())], [("b", torch.ones(2))]):
        stream = TensorStream({"a": (2,)}, torch.float32, {})
        with pytest.raises((AssertionError, ValueError)):
            stream.write(Path(tmp_path / "x"), given)
