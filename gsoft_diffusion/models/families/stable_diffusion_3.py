"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a transformer with joint attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel, T5EncoderModel, T5Tokenizer

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families.base import Conditioning
from gsoft_diffusion.models.families.flow import FlowModel, t5_embeddings
from gsoft_diffusion.models.families.stable_diffusion import clip_tokens
from gsoft_diffusion.models.original_layout import original_layout_3

T5_LENGTH = 256  # as diffusers' pipeline has it


@dataclass(kw_only=True)
class StableDiffusion3(FlowModel):
    """Medium and large, with or without dual attention and normalised queries.

    Source: Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*.
    """

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: T5Tokenizer
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel
    transformer: SD3Transformer2DModel

    title: ClassVar[str] = "Stable Diffusion 3 and 3.5"
    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    original_code: ClassVar[str] = "sgm"

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        return [self.text_encoder, self.text_encoder_2]

    @property
    def resolution(self) -> int:
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def largest_side(self) -> int:
        return self.transformer.config.pos_embed_max_size * self.size_step

    def check(self) -> None:
        transformer = self.transformer.config
        if transformer.in_channels != self.vae.config.latent_channels or transformer.patch_size != 2:
            raise UserError(f"{self.name}: its transformer does not take the VAE's latents")
        if transformer.joint_attention_dim != self.text_encoder_3.config.d_model:
            raise UserError(
                f"{self.name}: the third text encoder's width is {self.text_encoder_3.config.d_model}, "
                f"but the transformer takes {transformer.joint_attention_dim}"
            )
        clips: list[Any] = [self.text_encoder.config, self.text_encoder_2.config]
        if transformer.pooled_projection_dim != sum(clip.projection_dim for clip in clips):
            raise UserError(f"{self.name}: the transformer is not made for these CLIP text encoders")

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token numbers for each CLIP, and T5's embeddings, which no adapter changes."""
        t5 = t5_embeddings(self.tokenizer_3, self.text_encoder_3, prompts, T5_LENGTH)
        return clip_tokens(self, prompts) | {"t5": t5.to(self.device)}

    def encode(self, prepared: dict[str, Tensor]) -> Conditioning:
        """CLIP's last but one hidden states side by side, then T5's in the same width; both CLIPs' pooled outputs."""
        first = self.text_encoder(prepared["tokens"], output_hidden_states=True)
        second = self.text_encoder_2(prepared["tokens_2"], output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip = F.pad(clip, (0, prepared["t5"].shape[-1] - clip.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([clip, prepared["t5"]], dim=1),
            "pooled_projections": torch.cat([first.text_embeds, second.text_embeds], dim=-1),
        }

    @property
    def architecture(self) -> str:
        return "stable-diffusion-3"

    def original_layout(self) -> dict[str, Tensor]:
        return original_layout_3(
            self.transformer, self.vae, self.text_encoder, self.text_encoder_2, self.text_encoder_3
        )

    def sigmas(self, num_inference_steps: int) -> None:
        return None

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        views: Tensor,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        timesteps = timesteps.expand(len(noisy_latents))
        return self.transformer(noisy_latents.to(self.dtype), timestep=timesteps, **conditioning).sample.float()
