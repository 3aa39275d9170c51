"""The models that are measured: Stable Diffusion's UNets with random weights, the miniature; and on which device."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import known_device, load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
USUAL = {  # the type of numbers, and the side of latents, unless others are asked for
    "sd15": ("bfloat16", 64),
    "sdxl": ("bfloat16", 128),
    "mini": ("float32", 16),
}
BASES = tuple(USUAL)
CPU = torch.device("cpu")

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
# As unet/config.json on the hub, and configs/inference/sd_xl_base.yaml of Stability-AI/generative-models.
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def device(name: str) -> torch.device:
    """For argparse: the device of that name, which must be there."""
    try:
        return known_device(name)
    except UserError as error:
        raise ArgumentTypeError(str(error)) from error


def load_base(name: str, dtype: torch.dtype, on: torch.device = CPU) -> tuple[Any, Any, int]:
    """UNet and text encoder, frozen, and the text's length in tokens. SDXL comes without its text encoders: None."""
    if name == "mini":
        model: Any = load_model("data/mini_base", dtype=dtype, device=on)
        return model.unet, model.text_encoder, model.text_encoder.config.max_position_embeddings
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # never in float32 first: it would take twice the memory
    try:
        with on:
            unet = UNet2DConditionModel(**{"sd15": SD15, "sdxl": SDXL}[name]).requires_grad_(False)
            if name == "sdxl":
                return unet, None, 77
            text_encoder = CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            )
    finally:
        torch.set_default_dtype(torch.float32)
    return unet, text_encoder.requires_grad_(False), 77


def random_text(unet: Any, length: int) -> Tensor:
    """Embeddings (1, length, width) for a UNet whose text encoders are not there."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, length, unet.config.cross_attention_dim, generator=generator)
    return text.to(unet.device, unet.dtype)


def added_conditions(unet: Any, count: int) -> dict[str, Any]:
    """What a UNet takes besides text and timesteps, for so many samples: SDXL's pooled text and sizes of photos."""
    if unet.config.addition_embed_type != "text_time":
        return {}
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    told = {"text_embeds": (count, width), "time_ids": (count, 6)}
    zeros = {name: torch.zeros(shape, dtype=unet.dtype, device=unet.device) for name, shape in told.items()}
    return {"added_cond_kwargs": zeros}
