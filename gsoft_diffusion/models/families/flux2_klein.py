"""FLUX.2 klein: hidden states of Qwen3, a transformer with double- and single-stream blocks, patched latents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2Tokenizer, Qwen3ForCausalLM

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families.base import Conditioning, tokenized
from gsoft_diffusion.models.families.flow import FluxModel

FUSED_MATRICES = {"to_qkv_mlp_proj": "linear1", "to_out": "linear2"}  # what the original calls them
TEXT_LENGTH = 512  # as diffusers' pipeline has it
TEXT_LAYERS = (9, 18, 27)  # whose hidden states are the prompt's embeddings, side by side


@dataclass(kw_only=True)
class Flux2Klein(FluxModel):
    """The base models and the distilled ones, which guide themselves and are told nothing.

    In the single-stream blocks, query, key and value are rows of a matrix that the feed-forward layer has the rest of,
    and the attention's output is columns of another. These slices are adapted, each as if it were a layer.
    """

    vae: AutoencoderKLFlux2
    tokenizer: Qwen2Tokenizer
    text_encoder: Qwen3ForCausalLM
    transformer: Flux2Transformer2DModel

    title: ClassVar[str] = "FLUX.2 klein"
    pipeline: ClassVar[str] = "Flux2KleinPipeline"

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        return []  # Qwen is not trained: its embeddings are cached

    @property
    def guides_itself(self) -> bool:
        return bool(self.index_values.get("is_distilled", False))

    def check(self) -> None:
        transformer, text = self.transformer.config, self.text_encoder.config
        if transformer.in_channels != 4 * self.vae.config.latent_channels:
            raise UserError(f"{self.name}: its transformer does not take the VAE's latents")
        if transformer.joint_attention_dim != len(TEXT_LAYERS) * text.hidden_size:
            raise UserError(
                f"{self.name}: the text encoder gives {len(TEXT_LAYERS)}·{text.hidden_size} numbers a token, "
                f"but the transformer takes {transformer.joint_attention_dim}"
            )
        if transformer.guidance_embeds:
            raise UserError(f"{self.name}: of FLUX.2 only klein is supported, which has no guidance input")

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings themselves, (prompts, length, width): no adapter changes them."""
        chats: list[Any] = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]
        encoded = tokenized(self.tokenizer, chats, TEXT_LENGTH).to(self.text_encoder.device)
        with torch.no_grad():
            states = self.text_encoder.model(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        layers = torch.cat([states[layer] for layer in TEXT_LAYERS], dim=-1)
        return {"encoder_hidden_states": layers.to(self.device)}

    def encode(self, prepared: dict[str, Tensor]) -> Conditioning:
        return prepared

    def kohya_metadata(self) -> dict[str, str]:
        return {"ss_network_module": "networks.lora_flux_2"}

    def kohya_place(self, module: str) -> tuple[str, int]:
        """The fused matrices of the single-stream blocks are those of the original."""
        if found := re.search(r"\.single_transformer_blocks\.(\d+)\.attn\.(\w+)$", module):
            return f"lora_unet_single_blocks_{found[1]}_{FUSED_MATRICES[found[2]]}", 0
        return super().kohya_place(module)

    # Latents: two by two of the VAE's pixels on top of each other, normalised by its statistics

    def latent_shape(self, width: int, height: int | None = None) -> tuple[int, int, int]:
        factor = 2 * self.vae_scale_factor
        return 4 * self.vae.config.latent_channels, (height or width) // factor, width // factor

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mean + distribution.std * F.pixel_shuffle(noise, 2)
        mean, std = self._statistics(latents.device)
        return (F.pixel_unshuffle(latents, 2) - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents.device)
        with self.on_device(self.vae):
            return self.vae.decode(F.pixel_shuffle(latents.float() * std + mean, 2)).sample

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        # With `cpu_offload` they are in main memory; nothing waits for these copies.
        mean, std = (each[:, None, None].to(device, non_blocking=True) for each in (norm.running_mean, std))
        return mean, std

    # Denoising

    def dynamic_shift(self, num_inference_steps: int, latent_shape: tuple[int, int, int]) -> float:
        _, height, width = latent_shape
        return compute_empirical_mu(height * width, num_inference_steps)

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        views: Tensor,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        count, _, height, width = noisy_latents.shape
        text = conditioning["encoder_hidden_states"]
        tokens = self.transformer(
            noisy_latents.flatten(2).mT.to(self.dtype),
            encoder_hidden_states=text,
            timestep=timesteps.expand(count) / 1000,
            guidance=None,
            txt_ids=_places(1, 1, text.shape[1], self.device),
            img_ids=_places(height, width, 1, self.device),
        ).sample
        return tokens.mT.unflatten(2, (height, width)).float()


def _places(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """(height·width·length, 4): 0, row, column and place in the text of every token, made on the device."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in (1, height, width, length)))
