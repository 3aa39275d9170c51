"""The models that are measured: published ones with random weights or none, and the miniature; on which device."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any, NamedTuple

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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

SD21: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
# As transformer/config.json of each on the hub, where diffusers' defaults do not say the same; also in diffusers'
# scripts/convert_{sd3,flux,flux2}_to_diffusers.py. FLUX.2 dev's are the defaults.
SD3_MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM: dict[str, Any] = SD3_MEDIUM | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE: dict[str, Any] = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
FLUX_DEV: dict[str, Any] = {"guidance_embeds": True}
KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B: dict[str, Any] = KLEIN_4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
FLUX2_DEV: dict[str, Any] = {}
Z_IMAGE: dict[str, Any] = {}  # diffusers' defaults
# text_encoder/config.json, where transformers' defaults do not say the same: OpenAI's CLIP, and two of OpenCLIP.
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}


class Published(NamedTuple):
    """A published model's configuration. denoiser: its class. config: of that. text_encoders: those that may train."""

    denoiser: Any
    config: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...] = ()

    def networks(self) -> tuple[nn.Module, list[nn.Module]]:
        """Denoiser and text encoders, on PyTorch's meta device: shapes without numbers."""
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        with torch.device("meta"):
            encoders: list[nn.Module] = [
                kind(CLIPTextConfig(**config)) for kind, config in zip(kinds, self.text_encoders, strict=False)
            ]
            return self.denoiser(**self.config), encoders


PUBLISHED = {
    "Stable Diffusion 1.5": Published(UNet2DConditionModel, SD15, (CLIP_L,)),
    "Stable Diffusion 2.1": Published(UNet2DConditionModel, SD21, (CLIP_H,)),
    "Stable Diffusion XL": Published(UNet2DConditionModel, SDXL, (CLIP_L, CLIP_G)),
    "Stable Diffusion 3 medium": Published(SD3Transformer2DModel, SD3_MEDIUM, (CLIP_L, CLIP_G)),
    "Stable Diffusion 3.5 medium": Published(SD3Transformer2DModel, SD35_MEDIUM, (CLIP_L, CLIP_G)),
    "Stable Diffusion 3.5 large": Published(SD3Transformer2DModel, SD35_LARGE, (CLIP_L, CLIP_G)),
    "FLUX.1 dev": Published(FluxTransformer2DModel, FLUX_DEV, (CLIP_L,)),
    "FLUX.2 klein 4B": Published(Flux2Transformer2DModel, KLEIN_4B),
    "FLUX.2 klein 9B": Published(Flux2Transformer2DModel, KLEIN_9B),
    "FLUX.2 dev": Published(Flux2Transformer2DModel, FLUX2_DEV),
    "Z-Image": Published(ZImageTransformer2DModel, Z_IMAGE),
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
            text_encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L))
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
