"""The attentions of base models, and the linear layers in them."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

ATTENTIONS = (Attention, AttentionModuleMixin)  # diffusers' classes: the general one, and those of one model each
CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
TEXT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of joint attention, for the text's tokens


def attention_layers(attention: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are rotated, under the names in `PROJECTIONS` and, of joint attention, `TEXT_PROJECTIONS`.

    A joint attention may lack some: the last one writes nothing back to the text, and then the text asks nothing.
    """
    layers: dict[str, Any] = {name: getattr(attention, name, None) for name in (*PROJECTIONS, *TEXT_PROJECTIONS)}
    if isinstance(layers["to_out"], nn.ModuleList):
        layers["to_out"] = layers["to_out"][0]  # the other is dropout
    if layers["to_add_out"] is None:
        layers["add_q_proj"] = None
    return {name: layer for name, layer in layers.items() if layer is not None}


def clip_attention_layers(attention: CLIPAttention) -> dict[str, nn.Linear]:
    """The layers that are rotated, under the names in `CLIP_PROJECTIONS`."""
    return {name: getattr(attention, name) for name in CLIP_PROJECTIONS}
