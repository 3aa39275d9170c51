"""Stable Diffusion XL: two CLIP text encoders, and a UNet that is told of the photo's size and crop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families.base import Conditioning
from gsoft_diffusion.models.families.stable_diffusion import StableDiffusion
from gsoft_diffusion.models.noise import predicts_velocity
from gsoft_diffusion.models.original_layout import original_layout_xl, original_unet_module


@dataclass(kw_only=True)
class StableDiffusionXL(StableDiffusion):
    """The base model of SDXL and what was made from it; its refiner is another architecture.

    Source: Podell et al., *SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis*.
    """

    tokenizer_2: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection

    title: ClassVar[str] = "Stable Diffusion XL"
    pipeline: ClassVar[str] = "StableDiffusionXLPipeline"
    original_code: ClassVar[str] = "sgm"
    index: ClassVar[dict[str, Any]] = {}

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        return [self.text_encoder, self.text_encoder_2]

    def check(self) -> None:
        unet, vae = self.unet.config, self.vae.config
        if unet.addition_embed_type != "text_time" or unet.class_embed_type or unet.time_cond_proj_dim:
            raise UserError(f"{self.name}: its UNet is not the one of Stable Diffusion XL's base model")
        if unet.in_channels != vae.latent_channels or vae.latents_mean is not None:
            raise UserError(f"{self.name}: its latents are not those of Stable Diffusion XL's base model")
        width = sum(encoder.config.hidden_size for encoder in (self.text_encoder, self.text_encoder_2))
        if unet.cross_attention_dim != width:
            raise UserError(
                f"{self.name}: the text encoders' widths add up to {width}, "
                f"but the UNet takes {unet.cross_attention_dim}"
            )
        told = 6 * unet.addition_time_embed_dim + self.text_encoder_2.config.projection_dim
        if unet.projection_class_embeddings_input_dim != told:
            raise UserError(f"{self.name}: the UNet is not made for the second text encoder, or is SDXL's refiner")

    def encode(self, prepared: dict[str, Tensor]) -> Conditioning:
        """Both encoders' last but one hidden states side by side, and the second's pooled output."""
        first = self.text_encoder(prepared["tokens"], output_hidden_states=True)
        second = self.text_encoder_2(prepared["tokens_2"], output_hidden_states=True)
        hidden_states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": hidden_states, "text_embeds": second.text_embeds}

    def encode_negative(self, prompt: str) -> Conditioning:
        """Zeros for an empty prompt, as in diffusers where none is given, unless the checkpoint says otherwise."""
        conditioning = self.encode_prompts([prompt])
        if prompt or not self.index_values.get("force_zeros_for_empty_prompt", True):
            return conditioning
        return {name: torch.zeros_like(tensor) for name, tensor in conditioning.items()}

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        views: Tensor,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        text_embeds = conditioning["text_embeds"]
        return self.unet(
            noisy_latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": views.to(text_embeds.dtype)},
        ).sample.float()

    def original_layout(self) -> dict[str, Tensor]:
        return original_layout_xl(
            self.unet,
            self.vae,
            self.text_encoder,
            self.text_encoder_2,
            v_prediction=predicts_velocity(self.scheduler),
            zero_terminal_snr=bool(self.noise_scheduler().alphas_cumprod[-1] == 0),
        )

    @property
    def architecture(self) -> str:
        return "stable-diffusion-xl-v1-base"

    def kohya_metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}

    def kohya_place(self, module: str) -> tuple[str, int]:
        """For this family kohya counts the UNet's blocks as the original checkpoints do."""
        part, _, path = module.partition(".")
        if part == "unet":
            path = original_unet_module(self.unet, path)
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
        return f"{prefix}_{path.replace('.', '_')}", 0
