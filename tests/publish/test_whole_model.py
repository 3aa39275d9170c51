"""Whole models: which weights are cast when, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_families import write_sd3, write_sdxl

from gsoft.linear_slice import LinearSlice
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.whole_model import round_weights, save_text_encoder, with_room_for


def keys_of(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("write", [write_sdxl, write_sd3], ids=["XL", "3"])
def test_projections_of_text_encoders_keep_their_name(write, tmp_path):
    model = load_model(str(write(tmp_path / "base")))
    save_text_encoder(model.text_encoder_2, tmp_path / "saved")
    names = keys_of(tmp_path / "saved" / "model.safetensors")
    assert "text_projection.weight" in names
    assert all(name.startswith("text_model.") for name in names - {"text_projection.weight"})
    read = type(model.text_encoder_2).from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.text_encoder_2.state_dict().items())


@pytest.mark.parametrize(
    ("stored", "precision", "wanted"),
    [
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_only_layers_that_are_merged_into_get_room(base, stored, precision, wanted):
    """For the others are rounded from what is stored, and a model of twice the size may not fit into memory."""
    model = load_model(str(base), dtype=stored)
    attention = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with_room_for([attention.to_q, LinearSlice(attention.to_v, 0, 2, 3)], precision)
    merged = {id(attention.to_q.weight), id(attention.to_v.weight)}
    parameters = [*model.unet.parameters(), *model.text_encoder.parameters()]
    assert {parameter.dtype for parameter in parameters if id(parameter) in merged} == {wanted}
    assert {parameter.dtype for parameter in parameters if id(parameter) not in merged} == {stored}


def test_weights_are_rounded_in_place(base):
    """All of them; no second model is in memory."""
    model = load_model(str(base))
    before = {id(parameter): parameter.detach().clone() for parameter in model.unet.parameters()}
    round_weights(model, torch.bfloat16)
    assert {id(parameter) for parameter in model.unet.parameters()} == before.keys()
    assert all(torch.equal(each, before[id(each)].bfloat16()) for each in model.unet.parameters())
    assert {tensor.dtype for tensor in model.original_layout().values()} == {torch.bfloat16, torch.int64}
