"""Tensors that are rounded and written."""

from __future__ import annotations

import re

import pytest
import torch

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import new_places
from gsoft_diffusion.publish.tensor_files import rounded, write_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_with_a_point_are_rounded_and_others_are_not(dtype):
    assert torch.equal(rounded("x", torch.tensor([1 / 3, -2.0]), dtype), torch.tensor([1 / 3, -2.0]).to(dtype))
    assert rounded("x", torch.tensor([1, 2]), dtype).dtype == torch.int64


@pytest.mark.parametrize(
    ("number", "dtype", "advice"),
    [
        (1e6, torch.float16, "float16: give --precision bfloat16 or float32"),
        (3.4e38, torch.bfloat16, "bfloat16: give --precision float32"),
    ],
)
def test_what_is_too_large_is_refused_with_a_precision_that_takes_it(number, dtype, advice):
    with pytest.raises(UserError, match=re.escape(f"layer does not fit into {advice}")):
        rounded("layer", torch.tensor([number]), dtype)


def test_a_failed_write_leaves_nothing(tmp_path):
    place = tmp_path / "dog.safetensors"
    with (
        pytest.raises(UserError, match=r"--output: cannot write .*dog\.safetensors"),
        new_places("--output", place) as (unfinished,),
    ):
        write_tensors(unfinished / "below", {"a": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []
