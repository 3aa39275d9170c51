"""FLUX.2 dev: the large model, told its guidance, with hidden states of Mistral 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from transformers import BatchEncoding, Mistral3ForConditionalGeneration, PixtralProcessor

from gsoft_diffusion.models.families.base import tokenized
from gsoft_diffusion.models.families.flux2 import TEXT_LENGTH, Flux2Model


@dataclass(kw_only=True)
class Flux2Dev(Flux2Model):
    """Distilled to guide itself and told how much, as FLUX.1 dev is; it is trained at a guidance of 1 as well.

    The text encoder can see pictures, too, so that its processor is in the tokenizer's place; prompts have none.
    """

    vae: AutoencoderKLFlux2
    tokenizer: PixtralProcessor
    text_encoder: Mistral3ForConditionalGeneration
    transformer: Flux2Transformer2DModel

    title: ClassVar[str] = "FLUX.2 dev"
    pipeline: ClassVar[str] = "Flux2Pipeline"
    original_code: ClassVar[str] = "https://github.com/black-forest-labs/flux2"
    text_layers: ClassVar[tuple[int, ...]] = (10, 20, 30)
    is_told_guidance: ClassVar[bool] = True

    @property
    def architecture(self) -> str:
        return "flux-2-dev"

    @property
    def guides_itself(self) -> bool:
        return True

    @property
    def takes_guidance(self) -> bool:
        return True

    @property
    def usual_guidance(self) -> float:
        return 4.0  # of diffusers' Flux2Pipeline

    @property
    def tokenizers(self) -> list[Any]:
        return [self.tokenizer.tokenizer]

    def tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        """After diffusers' system message, in the processor's template; it adds no second mark of the beginning."""
        chats = self.tokenizer.apply_chat_template(format_input(list(prompts)), add_generation_prompt=False)
        (tokenizer,) = self.tokenizers
        begun = tokenizer.bos_token is not None and chats[0].startswith(tokenizer.bos_token)
        return tokenized(partial(tokenizer, add_special_tokens=not begun), chats, TEXT_LENGTH, prompts)
