"""Tiny UNets and CLIP text encoders with random weights, and adapters that have learned something."""

from __future__ import annotations

import gsoft_diffusion  # noqa: F401 # isort: skip - first: beside a CPU build of torch it makes torchvision importable
import torch
from diffusers import UNet2DConditionModel
from plain_models import randomise
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gsoft_diffusion import Adapter

__all__ = ["randomise", "run", "tiny_text_encoder", "tiny_unet", "tokens", "train"]


def tiny_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """Widths 32 and 64, text width 24; attention on both levels."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(config | changes)).eval()


def tiny_text_encoder(seed: int = 0, with_projection: bool = False) -> nn.Module:
    """Two layers of width 24."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=48,
        eos_token_id=49,
        pad_token_id=49,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def tokens() -> Tensor:
    return torch.arange(24).reshape(2, 12)


def run(unet: nn.Module, text_encoder: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The UNet's output for fixed latents, timesteps and text."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, 12, 24, generator=generator).to(dtype)
    if text_encoder is not None:
        text = text_encoder(tokens())[0]
    return unet(latents, torch.tensor([3, 500]), text).sample


def train(adapter: Adapter, loss: object, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few steps of Adam on `loss()`; returns the losses."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses
