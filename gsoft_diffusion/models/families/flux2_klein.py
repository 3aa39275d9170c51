"""FLUX.2 klein: the small models, with hidden states of Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from transformers import BatchEncoding, Qwen2Tokenizer, Qwen3ForCausalLM

from gsoft_diffusion.models.families.base import tokenized
from gsoft_diffusion.models.families.flow import qwen_chats
from gsoft_diffusion.models.families.flux2 import TEXT_LENGTH, Flux2Model


@dataclass(kw_only=True)
class Flux2Klein(Flux2Model):
    """The base models and the distilled ones, which guide themselves and are told nothing."""

    vae: AutoencoderKLFlux2
    tokenizer: Qwen2Tokenizer
    text_encoder: Qwen3ForCausalLM
    transformer: Flux2Transformer2DModel

    title: ClassVar[str] = "FLUX.2 klein"
    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    original_code: ClassVar[str] = "https://github.com/black-forest-labs/flux2"
    text_layers: ClassVar[tuple[int, ...]] = (9, 18, 27)
    is_told_guidance: ClassVar[bool] = False

    @property
    def architecture(self) -> str:
        return "flux-2-klein"

    @property
    def guides_itself(self) -> bool:
        return bool(self.index_values.get("is_distilled", False))

    @property
    def usual_guidance(self) -> float:
        return 4.0  # of diffusers' Flux2KleinPipeline

    def tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        return tokenized(self.tokenizer, qwen_chats(self.tokenizer, prompts, thinking=False), TEXT_LENGTH)
