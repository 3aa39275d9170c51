"""What the models of FLUX.2 have in common: hidden states of a language model, a transformer with double- and
single-stream blocks, patched latents.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding, PreTrainedModel

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.memory import waits_not
from gsoft_diffusion.models.families.base import Conditioning, in_tiles_if_needed
from gsoft_diffusion.models.families.flow import FluxModel

FUSED_MATRICES = {"to_qkv_mlp_proj": "linear1", "to_out": "linear2"}  # what the original calls them
TEXT_LENGTH = 512  # as diffusers' pipelines have it


class Flux2Model(FluxModel):
    """What a family adds: its parts, and how the text encoder is asked.

    In the single-stream blocks, query, key and value are rows of a matrix that the feed-forward layer has the rest of,
    and the attention's output is columns of another. These slices are adapted, each as if it were a layer.
    """

    text_encoder: Any
    text_layers: ClassVar[tuple[int, ...]]  # whose hidden states are the embeddings, side by side
    is_told_guidance: ClassVar[bool]  # whether the transformer has an input for the guidance scale

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        return []  # the language model is not trained: its embeddings are cached

    @property
    def text_width(self) -> int:
        """Width of the language model's hidden states."""
        return self.text_encoder.config.get_text_config().hidden_size

    @abstractmethod
    def tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        """The prompts as the language model is asked them: `input_ids` and `attention_mask`, (prompts, length)."""

    def check(self) -> None:
        transformer, layers = self.transformer.config, len(self.text_layers)
        if transformer.in_channels != 4 * self.vae.config.latent_channels:
            raise UserError(f"{self.name}: its transformer does not take the VAE's latents")
        if transformer.joint_attention_dim != layers * self.text_width:
            raise UserError(
                f"{self.name}: the text encoder gives {layers}·{self.text_width} numbers a token, "
                f"but the transformer takes {transformer.joint_attention_dim}"
            )
        if transformer.guidance_embeds != self.is_told_guidance:
            told = "is told a guidance" if transformer.guidance_embeds else "is not told a guidance"
            raise UserError(f"{self.name}: not a plain {self.title}: its transformer {told}")

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings themselves, (prompts, length, width): no adapter changes them."""
        encoded = self.tokens(prompts).to(self.text_encoder.device)
        with torch.no_grad():
            states = self.text_encoder.model(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        layers = torch.cat([states[layer] for layer in self.text_layers], dim=-1)
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
            return in_tiles_if_needed(
                self.vae, self.vae.decode, F.pixel_shuffle(latents.float() * std + mean, 2)
            ).sample

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        # With `cpu_offload` they are in main memory; nothing waits for these copies.
        mean, std = (
            each[:, None, None].to(device, non_blocking=waits_not(device)) for each in (norm.running_mean, std)
        )
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
            guidance=torch.full((count,), guidance_scale, device=self.device) if self.is_told_guidance else None,
            txt_ids=_places(1, 1, text.shape[1], self.device),
            img_ids=_places(height, width, 1, self.device),
        ).sample
        return tokens.mT.unflatten(2, (height, width)).float()


def _places(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """(height·width·length, 4): 0, row, column and place in the text of every token, made on the device."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in (1, height, width, length)))
