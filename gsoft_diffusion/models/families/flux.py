"""FLUX.1: a CLIP text encoder and T5, a transformer with double- and single-stream blocks on packed latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, T5EncoderModel, T5Tokenizer

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families.base import Conditioning
from gsoft_diffusion.models.families.flow import FluxModel, t5_embeddings
from gsoft_diffusion.models.families.stable_diffusion import clip_tokens

T5_LENGTH = 512  # as diffusers' pipeline has it


@dataclass(kw_only=True)
class Flux(FluxModel):
    """FLUX.1 dev, which was distilled to guide itself and is told how much, and schnell, which is not told.

    Training tells dev a guidance of 1: there its prediction is the velocity that flow matching asks for.
    """

    tokenizer: CLIPTokenizer
    tokenizer_2: T5Tokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    transformer: FluxTransformer2DModel

    title: ClassVar[str] = "FLUX.1"
    pipeline: ClassVar[str] = "FluxPipeline"
    original_code: ClassVar[str] = "https://github.com/black-forest-labs/flux"

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        return [self.text_encoder]

    @property
    def guides_itself(self) -> bool:
        return True

    @property
    def takes_guidance(self) -> bool:
        return self.transformer.config.guidance_embeds

    @property
    def usual_guidance(self) -> float:
        return 3.5  # of diffusers' FluxPipeline

    def check(self) -> None:
        transformer = self.transformer.config
        if transformer.in_channels != 4 * self.vae.config.latent_channels:
            raise UserError(f"{self.name}: not a plain text-to-image FLUX.1: its transformer takes more than latents")
        if transformer.joint_attention_dim != self.text_encoder_2.config.d_model:
            raise UserError(
                f"{self.name}: the second text encoder's width is {self.text_encoder_2.config.d_model}, "
                f"but the transformer takes {transformer.joint_attention_dim}"
            )

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token numbers for CLIP, and T5's embeddings, which no adapter changes."""
        t5 = t5_embeddings(self.tokenizer_2, self.text_encoder_2, prompts, T5_LENGTH)
        return clip_tokens(self, prompts) | {"t5": t5.to(self.device)}

    def encode(self, prepared: dict[str, Tensor]) -> Conditioning:
        """T5's embeddings and CLIP's pooled output."""
        pooled = self.text_encoder(prepared["tokens"]).pooler_output
        return {"encoder_hidden_states": prepared["t5"], "pooled_projections": pooled}

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        views: Tensor,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        count, _, height, width = noisy_latents.shape
        text_length = conditioning["encoder_hidden_states"].shape[1]
        packed = self.transformer(
            pack(noisy_latents).to(self.dtype),
            timestep=timesteps.expand(count) / 1000,
            guidance=torch.full((count,), guidance_scale, device=self.device) if self.takes_guidance else None,
            txt_ids=torch.zeros(text_length, 3, device=self.device),
            img_ids=places(height // 2, width // 2, self.device),
            **conditioning,
        ).sample
        return unpack(packed, height, width).float()

    @property
    def architecture(self) -> str:
        return f"flux-1-{'dev' if self.transformer.config.guidance_embeds else 'schnell'}"

    def kohya_metadata(self) -> dict[str, str]:
        return {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"}

    def kohya_place(self, module: str) -> tuple[str, int]:
        """Single-stream blocks have query, key, value and half of the feed-forward layer in one matrix."""
        part, _, path = module.partition(".")
        if part == "text_encoder":
            return f"lora_te1_{path.replace('.', '_')}", 0
        if path.startswith("single_transformer_blocks."):
            block = path.split(".")[1]
            rows = self.transformer.single_transformer_blocks[int(block)].proj_mlp.out_features
            return f"lora_unet_single_blocks_{block}_linear1", rows
        return super().kohya_place(module)


def pack(latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) as tokens (N, h·w/4, 4·C) of two by two."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (N, C, h/2, 2, w/2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack`: latents (N, C, height, width).

    tokens: (N, height·width/4, 4·C).
    height, width: in latent pixels, both even.
    """
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))  # (N, h/2, w/2, C, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """The place of every token of a picture: 0, row and column, (height·width, 3), float32.

    height, width: in tokens. device: where the result is made, so that no copy has to wait.
    """
    sides = [torch.arange(side, dtype=torch.float32, device=device) for side in (1, height, width)]
    return torch.cartesian_prod(*sides)
