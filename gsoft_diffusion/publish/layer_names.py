"""What other tools call the layers of an adapter."""

from __future__ import annotations

import re

from gsoft.linear_slice import AnyLinear, LinearSlice
from gsoft_diffusion.models.attention_layers import FUSED_MATRICES


def module_path(name: str) -> str:
    """Where a layer of the adapter (see `Adapter`) is in a diffusers pipeline.

    In text encoders by the names of transformers before 5.6, which every tool's loader understands.
    """
    if name.startswith("text_encoder"):
        return re.sub(r"^(\w+)\.layers\.(\d+)", r"\1.text_model.encoder.layers.\2.self_attn", name)
    return re.sub(r"\.to_out$", ".to_out.0", name)


def matrix_path(name: str, linear: AnyLinear) -> str:
    """Where the module with a layer's matrix is in a diffusers pipeline.

    name: the layer's, in the adapter. linear: the model's layer; if it is a slice, the module is the whole layer.
    """
    if not isinstance(linear, LinearSlice):
        return module_path(name)
    attention, _, projection = name.rpartition(".")
    return f"{attention}.{FUSED_MATRICES[projection]}"
