"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families.base import BaseModel, Conditioning, tokenized
from gsoft_diffusion.models.noise import predicts_velocity
from gsoft_diffusion.models.original_layout import is_open_clip, original_layout


@dataclass(kw_only=True)
class StableDiffusion(BaseModel):
    """Epsilon, v or sample prediction, by the scheduler's configuration."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel

    title: ClassVar[str] = "Stable Diffusion 1.x and 2.x"
    pipeline: ClassVar[str] = "StableDiffusionPipeline"
    original_code: ClassVar[str] = "sgm"
    index: ClassVar[dict[str, Any]] = {
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }

    @property
    def denoiser(self) -> Any:
        return self.unet

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        return [self.text_encoder]

    @property
    def resolution(self) -> int:
        return self.unet.config.sample_size * self.vae_scale_factor

    @property
    def size_step(self) -> int:
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def check(self) -> None:
        unet, text_width = self.unet.config, self.text_encoder.config.hidden_size
        if unet.cross_attention_dim != text_width:
            raise UserError(
                f"{self.name}: the text encoder's width is {text_width}, but the UNet takes {unet.cross_attention_dim}"
            )
        other = unet.addition_embed_type or unet.class_embed_type or unet.time_cond_proj_dim
        if other or unet.in_channels != self.vae.config.latent_channels:
            raise UserError(f"{self.name}: not a text-to-image model like Stable Diffusion 1.x or 2.x")

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token numbers (prompts, length), for each of the text encoders."""
        return clip_tokens(self, prompts)

    def encode(self, prepared: dict[str, Tensor]) -> Conditioning:
        """Text embeddings (prompts, length, width)."""
        return {"encoder_hidden_states": self.text_encoder(prepared["tokens"])[0]}

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        views: Tensor,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        return self.unet(noisy_latents.to(self.dtype), timesteps, **conditioning).sample.float()

    def original_layout(self) -> dict[str, Tensor]:
        return original_layout(self.unet, self.vae, self.text_encoder)

    @property
    def architecture(self) -> str:
        if not is_open_clip(self.text_encoder):
            return "stable-diffusion-v1"
        return f"stable-diffusion-v2-{'768-v' if predicts_velocity(self.scheduler) else '512'}"

    def kohya_metadata(self) -> dict[str, str]:
        second = is_open_clip(self.text_encoder)
        version = f"sd_v{2 if second else 1}{'_v' if predicts_velocity(self.scheduler) else ''}"
        return {"ss_base_model_version": version, "ss_v2": str(second)}

    def kohya_place(self, module: str) -> tuple[str, int]:
        return "lora_" + module.replace("text_encoder.", "te.").replace(".", "_"), 0


def clip_tokens(model: BaseModel, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token numbers of prompts, (prompts, length) on the model's device, for each of its CLIP text encoders.

    model: one whose `text_encoders` are one or two CLIPs.
    prompts: any number of texts; what does not fit is cut and said so.

    Returns them as `tokens` and, for a second text encoder, `tokens_2`.
    """
    tokens = {}
    for end, text_encoder in zip(("", "_2"), model.text_encoders, strict=False):
        tokenizer: CLIPTokenizer = getattr(model, f"tokenizer{end}")
        length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        tokens[f"tokens{end}"] = tokenized(tokenizer, prompts, length).input_ids.to(model.device)
    return tokens
