"""What the families that learn by flow matching have in common."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from gsoft_diffusion.models.families.base import BaseModel, tokenized
from gsoft_diffusion.models.flow_matching import FlowMatching


class FlowModel(BaseModel):
    """A model whose scheduler is diffusers' `FlowMatchEulerDiscreteScheduler`, with its denoiser a transformer.

    Most checkpoints do not say their resolution and sigmas, which are here as in diffusers' pipelines.
    """

    transformer: Any

    @property
    def resolution(self) -> int:
        return 128 * self.vae_scale_factor

    @property
    def denoiser(self) -> Any:
        return self.transformer

    @property
    def size_step(self) -> int:
        return 2 * self.vae_scale_factor  # the transformers take two by two latent pixels for one token

    @property
    def has_known_noise(self) -> bool:
        return "shift" in self.scheduler.config

    def noise_scheduler(self) -> FlowMatching:
        return FlowMatching(self.scheduler)

    def draw_timesteps(self, uniform: Tensor) -> Tensor:
        return self.noise_scheduler().draw(uniform)

    def make_scheduler(self, kind: Any, num_inference_steps: int, latent_shape: tuple[int, int, int]) -> Any:
        """A scheduler whose timesteps are shifted towards noise as the checkpoint says.

        kind: the scheduler's class; those that know no sigmas have their own steps before the shift.
        num_inference_steps: how many steps it takes from noise to picture.
        latent_shape: (channels, height, width): the shift is more for larger pictures if the checkpoint says so.
        """
        config, shift = self.scheduler.config, self.scheduler.config.shift
        if config.get("use_dynamic_shifting"):  # the exponential shift by mu is the plain one by exp(mu)
            shift = math.exp(self.dynamic_shift(num_inference_steps, latent_shape))
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}  # for solvers
        scheduler = kind.from_config(config, use_dynamic_shifting=False, shift=shift, **flow)
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        options = {"sigmas": self.sigmas(num_inference_steps)} if takes_sigmas else {}
        scheduler.set_timesteps(num_inference_steps, **options)
        return scheduler

    def keeps_schedule(self, scheduler: Any) -> bool:
        """Whether the scheduler's class takes the shift of timesteps: in flow matching that is all there is to keep."""
        return not {"shift", "flow_shift"}.isdisjoint(inspect.signature(type(scheduler)).parameters)

    def dynamic_shift(self, num_inference_steps: int, latent_shape: tuple[int, int, int]) -> float:
        """The logarithm `mu` of the shift of timesteps, for checkpoints that shift larger pictures more.

        It is linear in the number of tokens between the scheduler's two points.

        num_inference_steps: without effect here; some families' shift depends on it.
        latent_shape: (channels, height, width) of the latents; two by two latent pixels are a token.
        """
        config = self.scheduler.config
        _, height, width = latent_shape
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (height * width // 4 - config.base_image_seq_len)

    def sigmas(self, num_inference_steps: int) -> np.ndarray | None:
        """Sigmas (num_inference_steps,) before shifting, from 1 downwards; None for the scheduler's own."""
        return np.linspace(1, 1 / num_inference_steps, num_inference_steps)


# What the original calls the joint attention's projections; where query, key and value share a matrix, in this order.
ORIGINAL_ATTENTION = {
    "to_q": "img_attn_qkv",
    "to_k": "img_attn_qkv",
    "to_v": "img_attn_qkv",
    "to_out.0": "img_attn_proj",
    "add_q_proj": "txt_attn_qkv",
    "add_k_proj": "txt_attn_qkv",
    "add_v_proj": "txt_attn_qkv",
    "to_add_out": "txt_attn_proj",
}


class FluxModel(FlowModel):
    """What FLUX.1 and FLUX.2 have in common: the names of the original's layers."""

    def kohya_place(self, module: str) -> tuple[str, int]:
        """As in the original: `transformer.transformer_blocks.0.attn.to_q` is in `double_blocks_0_img_attn_qkv`."""
        block, _, layer = module.removeprefix("transformer.transformer_blocks.").partition(".attn.")
        return f"lora_unet_double_blocks_{block}_{ORIGINAL_ATTENTION[layer]}", 0


@torch.no_grad()
def t5_embeddings(tokenizer: T5Tokenizer, encoder: T5EncoderModel, prompts: Sequence[str], length: int) -> Tensor:
    """T5's embeddings of prompts, (prompts, length, width), on its own device; no adapter changes them.

    tokenizer, encoder: T5's two halves; the embeddings have the encoder's dtype.
    prompts: any number of texts.
    length: tokens of each; what does not fit is cut and said so.
    """
    return encoder(tokenized(tokenizer, prompts, length).input_ids.to(encoder.device))[0]


def qwen_chats(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[str]:
    """Prompts as a user's words in Qwen3's template for chats.

    tokenizer: Qwen's, which has the template. prompts: any number of texts. thinking: whether the answer may begin with
    a thought.
    """
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for prompt in prompts
    ]
