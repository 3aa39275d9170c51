"""The models that are measured: Stable Diffusion 1.5's real configuration with random weights, the miniature base."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from gsoft_diffusion.models.loading import load_model

BASES = ("sd15", "mini")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_base(name: str, dtype: torch.dtype) -> tuple[Any, Any, int]:
    """UNet and text encoder, frozen, and the text's length in tokens."""
    if name == "mini":
        model: Any = load_model("data/mini_base", dtype=dtype)
        return model.unet, model.text_encoder, model.text_encoder.config.max_position_embeddings
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # never in float32 first: it would take twice the memory
    try:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    return unet.requires_grad_(False), text_encoder.requires_grad_(False), 77
