"""Z-Image: one of Qwen3's hidden states for each word, and a transformer whose one stream holds picture and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Tokenizer, Qwen3Model

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families.base import Conditioning, tokenized
from gsoft_diffusion.models.families.flow import FlowModel, qwen_chats
from gsoft_diffusion.models.original_layout import vae_tensors

TEXT_LENGTH = 512  # as diffusers' pipeline has it
TEXT_LAYER = -2  # whose hidden states are the prompt's embeddings: what goes into the last layer
TURBO_SHIFT = 3.0  # of the published Turbo's timesteps; the base model's is 6
PATCH = "2-1"  # what the layers for patches of 2 by 2 latent pixels, of one picture, are named after
ORIGINAL_LAYERS = {
    f"all_x_embedder.{PATCH}.": "x_embedder.",
    f"all_final_layer.{PATCH}.": "final_layer.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
}


@dataclass(kw_only=True)
class ZImage(FlowModel):
    """Z-Image and Z-Image-Turbo.

    The transformer's time runs from 0 at noise to 1 at the picture, and it predicts the way there, `x − ε`: both are
    the reverse of what the schedulers have. Prompts keep their own lengths. The adapter is in every attention: of the
    blocks that see the picture alone (`noise_refiner`), the text alone (`context_refiner`), and both (`layers`).
    """

    tokenizer: Qwen2Tokenizer
    text_encoder: Qwen3Model
    transformer: ZImageTransformer2DModel

    title: ClassVar[str] = "Z-Image"
    pipeline: ClassVar[str] = "ZImagePipeline"
    original_code: ClassVar[str] = "https://github.com/Tongyi-MAI/Z-Image"

    @property
    def text_encoders(self) -> list[PreTrainedModel]:
        return []  # Qwen is not trained: its embeddings are cached

    @property
    def largest_side(self) -> int:
        return min(self.transformer.config.axes_lens[1:]) * self.size_step

    @property
    def usual_guidance(self) -> float | None:
        """1 for Turbo, which was distilled to do without guidance, else None.

        Nothing but its scheduler tells Turbo from the base model.
        """
        return 1.0 if self.scheduler.config.shift == TURBO_SHIFT else None

    def check(self) -> None:
        transformer, text = self.transformer.config, self.text_encoder.config
        if transformer.in_channels != self.vae.config.latent_channels or PATCH not in self.transformer.all_x_embedder:
            raise UserError(f"{self.name}: its transformer does not take the VAE's latents")
        if transformer.cap_feat_dim != text.hidden_size:
            raise UserError(
                f"{self.name}: the text encoder's width is {text.hidden_size}, "
                f"but the transformer takes {transformer.cap_feat_dim}"
            )
        if transformer.siglip_feat_dim is not None:
            raise UserError(f"{self.name}: not a plain text-to-image Z-Image: its transformer also takes pictures")

    # Prompts

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings themselves, (prompts, length, width), which no adapter changes, and how many of them count.

        These `lengths` (prompts,) decide shapes, so they are on the CPU.
        """
        chats = qwen_chats(self.tokenizer, prompts, thinking=True)
        encoded = tokenized(self.tokenizer, chats, TEXT_LENGTH, padding_side="right")
        lengths = encoded.attention_mask.sum(dim=1)
        with torch.no_grad():
            states = self.text_encoder(
                **encoded.to(self.text_encoder.device), output_hidden_states=True, use_cache=False
            ).hidden_states
        return {"embeddings": states[TEXT_LAYER].to(self.device), "lengths": lengths}

    def encode(self, prepared: dict[str, Tensor]) -> Conditioning:
        return prepared

    # Denoising

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        views: Tensor,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        captions = [
            embeddings[: int(length)]
            for embeddings, length in zip(conditioning["embeddings"], conditioning["lengths"], strict=True)
        ]
        pictures = noisy_latents.to(self.dtype)[:, :, None].unbind()  # each a film of one picture, (C, 1, h, w)
        times = (1000 - timesteps.expand(len(pictures))) / 1000
        return -torch.stack(self.transformer(list(pictures), times, captions).sample).squeeze(2).float()

    # Other programs' names

    def original_layout(self) -> dict[str, Tensor]:
        return (
            {f"model.diffusion_model.{name}": tensor for name, tensor in transformer_tensors(self.transformer).items()}
            | {f"vae.{name}": tensor for name, tensor in vae_tensors(self.vae).items()}
            | {
                f"text_encoders.qwen3_4b.transformer.model.{name}": tensor
                for name, tensor in self.text_encoder.state_dict().items()
            }
        )

    @property
    def architecture(self) -> str:
        return "z-image"

    def kohya_metadata(self) -> dict[str, str]:
        return {"ss_network_module": "networks.lora_zimage"}

    def kohya_place(self, module: str) -> tuple[str, int]:
        """As in diffusers, whose layers musubi-tuner has: `lora_unet_layers_0_attention_to_q`."""
        return f"lora_unet_{module.removeprefix('transformer.').replace('.', '_')}", 0


def transformer_tensors(transformer: ZImageTransformer2DModel) -> dict[str, Tensor]:
    """The transformer's weights under their original names, with query, key and value in one matrix."""
    tensors = transformer.state_dict()
    renamed = {}
    for path in [name.removesuffix(".to_q.weight") for name in tensors if name.endswith(".attention.to_q.weight")]:
        renamed[f"{path}.qkv.weight"] = torch.cat([tensors.pop(f"{path}.to_{part}.weight") for part in "qkv"])
    for name, tensor in tensors.items():
        for ours, original in ORIGINAL_LAYERS.items():
            name = name.replace(ours, original)
        renamed[name] = tensor
    return renamed
