"""Which base model an adapter was trained on: recognised by the fingerprint of its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

import gsoft.fingerprint
from gsoft.fingerprint import BaseModelIdentity
from gsoft.linear_slice import AnyLinear
from gsoft_diffusion.foundation.model_names import lasting_name, public_name
from gsoft_diffusion.models.attention_layers import ATTENTIONS, attention_layers, clip_attention_layers
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.frozen_storage import number_count


def identity_of(model: BaseModel) -> BaseModelIdentity:
    """The base model's identity, which an adapter's file keeps. Ask before an adapter is injected."""
    return BaseModelIdentity(lasting_name(model.name), fingerprint=fingerprint(model.denoiser, model.text_encoders))


def public_identity_of(model: BaseModel) -> BaseModelIdentity:
    """As `identity_of`, with a name that others may read."""
    return BaseModelIdentity(public_name(model.name), fingerprint=fingerprint(model.denoiser, model.text_encoders))


def fingerprint(unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> str:
    """Recognises a base model whichever dtype it is loaded in; see `gsoft.fingerprint.fingerprint`.

    unet: the denoiser, a UNet or a transformer.
    text_encoders: the CLIP text encoders, in the pipeline's order: in training and in use the same.

    Made of shapes and head counts of every attention, of the models' sizes, and of all attention weights, but for fused
    ones (see `is_fused`): adapters from before they were rotated are of the same model. For models with or without an
    adapter, but not with a merged one.
    """
    architecture: list[Any] = [number_count(model) for model in (unet, *text_encoders)]
    weights: list[Tensor] = []
    layers: Mapping[str, AnyLinear]
    for model in (unet, *text_encoders):
        for module in model.modules():
            if isinstance(module, ATTENTIONS) and hasattr(module, "to_q"):
                layers, heads = attention_layers(module), module.heads
            elif isinstance(module, CLIPAttention):
                layers, heads = clip_attention_layers(module), module.num_heads
            else:
                continue
            architecture.append([heads, *(list(layer.weight.shape) for layer in layers.values())])
            weights += [layer.weight for layer in layers.values()]
    return gsoft.fingerprint.fingerprint(architecture, weights)
