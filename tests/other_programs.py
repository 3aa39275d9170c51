"""Small models with the real structure of each family and random weights, and adapters of ours for them.

Weights go by the names that they have in other programs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from tiny_models import randomise
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion import fingerprint, inject, load_adapter, save_adapter
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.original_layout import joint_transformer_tensors, text_encoder_tensors, unet_tensors

Tensors = dict[str, Tensor]
ATTENTION = re.compile(r"attn|attention|linear[12]")  # in names of the weights that adapters turn


@dataclass
class Structure:
    """parts: makes the denoiser and the text encoders. names: the denoiser's weights by other programs' names."""

    parts: Callable[[], tuple[nn.Module, list[nn.Module]]]
    names: Callable[[Any], Tensors]


def unet(**changes: object) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64, 64),
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    }
    return UNet2DConditionModel(**config | changes)


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, projection_dim=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )


FLUX = {"attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 32, "pooled_projection_dim": 32}


def flux_names(transformer: FluxTransformer2DModel) -> Tensors:
    """The attention's weights as Black Forest Labs' files have them: fused."""
    tensors = double_blocks(transformer)
    for index, block in enumerate(transformer.single_transformer_blocks):
        layers = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        tensors[f"single_blocks.{index}.linear1.weight"] = torch.cat([layer.weight for layer in layers])
    return tensors


def flux2_names(transformer: Flux2Transformer2DModel) -> Tensors:
    """The attention's weights as Black Forest Labs' files have them; diffusers fuses single blocks, too."""
    tensors = double_blocks(transformer)
    for index, block in enumerate(transformer.single_transformer_blocks):
        tensors[f"single_blocks.{index}.linear1.weight"] = block.attn.to_qkv_mlp_proj.weight
        tensors[f"single_blocks.{index}.linear2.weight"] = block.attn.to_out.weight
    return tensors


def double_blocks(transformer: FluxTransformer2DModel | Flux2Transformer2DModel) -> Tensors:
    """The attention's weights of a FLUX transformer's double-stream blocks."""
    tensors: Tensors = {}
    for index, block in enumerate(transformer.transformer_blocks):
        place, attention = f"double_blocks.{index}", block.attn
        for stream, layers in {
            "img": ("to_q", "to_k", "to_v"),
            "txt": ("add_q_proj", "add_k_proj", "add_v_proj"),
        }.items():
            tensors[f"{place}.{stream}_attn.qkv.weight"] = torch.cat(
                [getattr(attention, name).weight for name in layers]
            )
        tensors[f"{place}.img_attn.proj.weight"] = attention.to_out[0].weight
        tensors[f"{place}.txt_attn.proj.weight"] = attention.to_add_out.weight
    return tensors


def z_image_names(transformer: ZImageTransformer2DModel) -> Tensors:
    """The attention's weights as Z-Image's one file for ComfyUI has them: query, key and value in one matrix."""
    tensors: Tensors = {}
    for part in ("noise_refiner", "context_refiner", "layers"):
        for index, block in enumerate(getattr(transformer, part)):
            place, attention = f"{part}.{index}.attention", block.attention
            layers = (attention.to_q, attention.to_k, attention.to_v)
            tensors[f"{place}.qkv.weight"] = torch.cat([layer.weight for layer in layers])
            tensors[f"{place}.out.weight"] = attention.to_out[0].weight
    return tensors


STRUCTURES = {
    "SD 1.5": Structure(lambda: (unet(), [CLIPTextModel(text_config(32))]), unet_tensors),
    "SDXL": Structure(
        lambda: (
            unet(
                block_out_channels=(32, 64, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 3),
                attention_head_dim=(2, 4, 4),
                cross_attention_dim=96,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,
            ),
            [CLIPTextModel(text_config(32)), CLIPTextModelWithProjection(text_config(64))],
        ),
        unet_tensors,
    ),
    "SD 3.5": Structure(
        lambda: (
            SD3Transformer2DModel(
                sample_size=16,
                num_layers=2,
                attention_head_dim=64,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=128,
                pooled_projection_dim=32,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
            [],
        ),
        joint_transformer_tensors,
    ),
    "FLUX.1": Structure(
        lambda: (FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=2, **FLUX), []),
        flux_names,
    ),
    "FLUX.2": Structure(
        lambda: (
            Flux2Transformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=128,
                num_attention_heads=1,
                joint_attention_dim=48,
                timestep_guidance_channels=32,
                guidance_embeds=False,
            ),
            [],
        ),
        flux2_names,
    ),
    "Z-Image": Structure(
        lambda: (
            ZImageTransformer2DModel(
                dim=64,
                n_layers=2,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                axes_dims=[8, 12, 12],
                axes_lens=[1024, 64, 64],
            ),
            [],
        ),
        z_image_names,
    ),
}


class Trained:
    """A base model, and the file of an adapter for it that has learned something."""

    def __init__(
        self, structure: Structure, dtype: torch.dtype, folder: Path, parametrization: str = "scaled_cayley"
    ) -> None:
        torch.manual_seed(0)
        self.structure, self.file = structure, folder / "adapter.safetensors"
        denoiser, encoders = structure.parts()
        self.denoiser, self.encoders = nn.Module.to(denoiser, dtype), [encoder.to(dtype) for encoder in encoders]
        identity = BaseModelIdentity("tiny", fingerprint(self.denoiser, self.encoders))
        config = AdapterConfig(nblocks=4, parametrization=parametrization, text_encoder=bool(encoders))
        adapter = inject(config, self.denoiser, self.encoders)
        randomise(adapter)
        save_adapter(self.file, adapter, base_model=identity, training={}, prompts={})
        adapter.remove()

    def names(self) -> Tensors:
        """The denoiser's weights as they are."""
        return {name: tensor.detach().clone() for name, tensor in self.structure.names(self.denoiser).items()}

    def clip_names(self) -> Tensors:
        """The text encoders' weights as they are."""
        return {
            f"{place}.transformer.{name}": tensor.detach().clone()
            for place, encoder in zip(("clip_l", "clip_g"), self.encoders, strict=False)
            for name, tensor in text_encoder_tensors(encoder).items()
        }

    def rotated(self, strength: float) -> Tensors:
        """Our `W'` of every weight."""
        adapter, _ = load_adapter(self.file, self.denoiser, self.encoders, strength=strength)
        adapter.merge()
        tensors = {f"diffusion_model.{name}": tensor for name, tensor in self.names().items()} | self.clip_names()
        adapter.remove()
        return tensors

    def check(self, found: Tensors, strength: float, close: Callable[[Tensor, Tensor], bool]) -> None:
        """Fail unless every weight of another program is close to ours, and all attention has changed."""
        wanted, base = self.rotated(strength), self.rotated(0.0)
        attention = {name for name, tensor in wanted.items() if ATTENTION.search(name) and tensor.ndim == 2}
        assert {name for name, tensor in wanted.items() if not torch.equal(tensor, base[name])} == attention
        assert not [name for name in wanted if not close(found[name], wanted[name])]
