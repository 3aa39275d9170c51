"""The attentions of base models, and the linear layers in them."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from gsoft.linear_slice import AnyLinear, LinearSlice

ATTENTIONS = (Attention, AttentionModuleMixin)  # diffusers' classes: the general one, and those of one model each
CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
# The matrices of a fused attention that `PROJECTIONS` are slices of.
FUSED_MATRICES = {
    "to_q": "to_qkv_mlp_proj",
    "to_k": "to_qkv_mlp_proj",
    "to_v": "to_qkv_mlp_proj",
    "to_out": "to_out",
}
TEXT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of joint attention, for the text's tokens


def denoiser_attentions(denoiser: nn.Module, fused: bool) -> dict[str, nn.Module]:
    """The attentions whose layers are rotated, by their paths.

    denoiser: the UNet or transformer. fused: whether those that share matrices with the feed-forward layer (see
    `is_fused`) are among them.
    """
    return {
        path: module
        for path, module in denoiser.named_modules()
        if isinstance(module, ATTENTIONS) and (hasattr(module, "to_q") or (fused and is_fused(module)))
    }


def is_fused(attention: nn.Module) -> bool:
    """Whether query, key and value are rows of a matrix that they share with the feed-forward layer beside them.

    The attention's outputs and the feed-forward layer's then go through one matrix, too, as its first and last columns.
    So it is in FLUX.2's single-stream blocks.
    """
    return hasattr(attention, "to_qkv_mlp_proj")


def attention_layers(attention: Any) -> dict[str, AnyLinear]:
    """The layers that are rotated, under the names in `PROJECTIONS` and, of joint attention, `TEXT_PROJECTIONS`.

    A joint attention may lack some: the last one writes nothing back to the text, and then the text asks nothing. Of a
    fused attention they are slices, as if they were layers of their own.
    """
    if is_fused(attention):
        width = attention.inner_dim
        rows = enumerate(PROJECTIONS[:3])
        slices = {name: LinearSlice(attention.to_qkv_mlp_proj, 0, place * width, width) for place, name in rows}
        return {**slices, "to_out": LinearSlice(attention.to_out, 1, 0, width)}
    layers: dict[str, Any] = {name: getattr(attention, name, None) for name in (*PROJECTIONS, *TEXT_PROJECTIONS)}
    if isinstance(layers["to_out"], nn.ModuleList):
        layers["to_out"] = layers["to_out"][0]  # the other is dropout
    if layers["to_add_out"] is None:
        layers["add_q_proj"] = None
    return {name: layer for name, layer in layers.items() if layer is not None}


def clip_attention_layers(attention: CLIPAttention) -> dict[str, nn.Linear]:
    """The layers that are rotated, under the names in `CLIP_PROJECTIONS`."""
    return {name: getattr(attention, name) for name in CLIP_PROJECTIONS}
