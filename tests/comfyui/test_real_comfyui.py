"""ComfyUI's own LoRA loader reads our adapter's file, with the node pack in place.

COMFYUI=~/ComfyUI python -m pytest tests/comfyui/test_real_comfyui.py    # a checkout whose requirements are installed

The models have the real structure of each family, scaled down, with random weights.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_pack import PACK, close_in_half
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from tiny_models import randomise
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion import fingerprint, inject, load_adapter, save_adapter
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.original_layout import joint_transformer_tensors, text_encoder_tensors, unet_tensors

pytestmark = pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI names no checkout of ComfyUI")

STRENGTHS = (0.5, 1.0, 1.5)
Tensors = dict[str, Tensor]


@cache
def comfy() -> SimpleNamespace:
    """ComfyUI's modules, after it has loaded the node pack as one of its custom nodes."""
    sys.path.append(os.environ["COMFYUI"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.model_base
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models
    import folder_paths
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(PACK)))
    return SimpleNamespace(**vars(comfy), nodes=nodes, folder_paths=folder_paths)


# Families: networks of diffusers and transformers, and how ComfyUI calls their weights


@dataclass
class Family:
    """parts: makes the denoiser and the text encoders. model: ComfyUI's denoiser for its weights, under the names that
    `names` gives them. clip: ComfyUI's text encoders.
    """

    parts: Callable[[], tuple[nn.Module, list[nn.Module]]]
    names: Callable[[Any], Tensors]
    model: Callable[[Tensors], nn.Module]
    clip: Callable[[Sequence[nn.Module]], nn.Module | None] = lambda encoders: None


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


def detected(kind: str) -> Callable[[Tensors], nn.Module]:
    """ComfyUI's model of this kind, in the sizes that it finds in the weights itself."""

    def make(tensors: Tensors) -> nn.Module:
        sizes = comfy().model_detection.detect_unet_config(tensors, "")
        config = getattr(comfy().supported_models, kind)(sizes | {"dtype": next(iter(tensors.values())).dtype})
        return config.get_model(tensors)

    return make


def sd1_clip(encoders: Sequence[nn.Module]) -> nn.Module:
    return comfy().sd1_clip.SD1ClipModel(
        dtype=encoders[0].dtype, model_options={"clip_l_model_config": encoders[0].config.to_dict()}
    )


def sdxl_clip(encoders: Sequence[nn.Module]) -> nn.Module:
    names = ("clip_l_model_config", "clip_g_model_config")
    configs = {name: encoder.config.to_dict() for name, encoder in zip(names, encoders, strict=True)}
    return comfy().sdxl_clip.SDXLClipModel(dtype=encoders[0].dtype, model_options=configs)


FLUX = {"attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 32, "pooled_projection_dim": 32}


def flux_model(tensors: Tensors) -> nn.Module:
    """ComfyUI reads these sizes from weights that we have no use for."""
    config = comfy().supported_models.FluxSchnell(
        {
            "image_model": "flux",
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "vec_in_dim": 32,
            "context_in_dim": 32,
            "hidden_size": 128,
            "mlp_ratio": 4.0,
            "num_heads": 1,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": False,
            "dtype": next(iter(tensors.values())).dtype,
        }
    )
    return config.get_model(tensors)


def flux_names(transformer: FluxTransformer2DModel) -> Tensors:
    """The attention's weights as Black Forest Labs' files have them: fused."""
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
    for index, block in enumerate(transformer.single_transformer_blocks):
        layers = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        tensors[f"single_blocks.{index}.linear1.weight"] = torch.cat([layer.weight for layer in layers])
    return tensors


FAMILIES = {
    "SD 1.5": Family(lambda: (unet(), [CLIPTextModel(text_config(32))]), unet_tensors, detected("SD15"), sd1_clip),
    "SDXL": Family(
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
        detected("SDXL"),
        sdxl_clip,
    ),
    "SD 3.5": Family(
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
        detected("SD3"),
    ),
    "FLUX.1": Family(
        lambda: (FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=2, **FLUX), []),
        flux_names,
        flux_model,
    ),
}


class Pair:
    """A base model with a trained adapter of ours, and the same base model in ComfyUI."""

    def __init__(self, family: Family, dtype: torch.dtype, folder: Path, parametrization: str = "cayley") -> None:
        torch.manual_seed(0)
        self.family, self.file = family, folder / "adapter.safetensors"
        denoiser, encoders = family.parts()
        self.denoiser, self.encoders = nn.Module.to(denoiser, dtype), [encoder.to(dtype) for encoder in encoders]
        self.model, self.clip = family.model(self.names()), family.clip(self.encoders)
        self._copy_to_comfyui()
        identity = BaseModelIdentity("tiny", fingerprint(self.denoiser, self.encoders))
        config = AdapterConfig(nblocks=4, parametrization=parametrization, text_encoder=bool(encoders))
        adapter = inject(config, self.denoiser, self.encoders)
        randomise(adapter)
        save_adapter(self.file, adapter, base_model=identity, training={}, prompts={})
        adapter.remove()

    def names(self) -> Tensors:
        """Our denoiser's weights as they are, by ComfyUI's names."""
        return {name: tensor.detach().clone() for name, tensor in self.family.names(self.denoiser).items()}

    def clip_names(self) -> Tensors:
        """Our text encoders' weights as they are, by ComfyUI's names."""
        return {
            f"{place}.transformer.{name}": tensor.detach().clone()
            for place, encoder in zip(("clip_l", "clip_g"), self.encoders, strict=False)
            for name, tensor in text_encoder_tensors(encoder).items()
        }

    def _copy_to_comfyui(self) -> None:
        weights = self.names()
        _, unknown = self.model.diffusion_model.load_state_dict(weights, strict=False)
        assert not unknown
        if self.clip is not None:
            _, unknown = self.clip.load_state_dict(self.clip_names(), strict=False)
            assert not unknown

    def ours(self, strength: float) -> Tensors:
        """Our `W'` of every weight, by ComfyUI's names."""
        adapter, _ = load_adapter(self.file, self.denoiser, self.encoders, strength=strength)
        adapter.merge()
        tensors = {f"diffusion_model.{name}": tensor for name, tensor in self.names().items()} | self.clip_names()
        adapter.remove()
        return tensors

    def theirs(self, strength: float) -> Tensors:
        """ComfyUI's weights, after its node for LoRAs."""
        place = torch.device("cpu")
        model = comfy().model_patcher.ModelPatcher(self.model, load_device=place, offload_device=place)
        clip = None
        if self.clip is not None:
            clip = comfy().sd.CLIP(no_init=True)
            clip.cond_stage_model, clip.tokenizer, clip.layer_idx = self.clip, None, None
            clip.tokenizer_options, clip.use_clip_schedule, clip.apply_hooks_to_conds = {}, False, None
            clip.patcher = comfy().model_patcher.ModelPatcher(self.clip, load_device=place, offload_device=place)
        comfy().folder_paths.add_model_folder_path("loras", str(self.file.parent), is_default=True)
        loaded = comfy().nodes.LoraLoader().load_lora(model, clip, self.file.name, strength, strength)
        tensors: Tensors = {}
        for patcher in (loaded[0], *([loaded[1].patcher] if clip else [])):
            patched = patcher.patch_model(device_to=place)
            tensors |= {name: tensor.detach().clone() for name, tensor in patched.state_dict().items()}
            patcher.unpatch_model(device_to=place)
        return tensors


def compare(pair: Pair, strength: float, caplog, close: Callable[[Tensor, Tensor], bool]) -> None:
    with caplog.at_level(logging.WARNING):
        found = pair.theirs(strength)
    assert not [message for message in caplog.messages if "not loaded" in message or "gsoft" in message]
    wanted, base = pair.ours(strength), pair.ours(0.0)
    attention = {name for name, tensor in wanted.items() if re.search(r"attn|linear1", name) and tensor.ndim == 2}
    assert {name for name, tensor in wanted.items() if not torch.equal(tensor, base[name])} == attention
    assert not [name for name in wanted if not close(found[name], wanted[name])]


@pytest.fixture(
    scope="module", params=[(name, dtype) for name in FAMILIES for dtype in ("float32", "float16")], ids="-".join
)
def pair(request, tmp_path_factory) -> Pair:
    name, dtype = request.param
    return Pair(FAMILIES[name], getattr(torch, dtype), tmp_path_factory.mktemp("loras"))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_weights_are_ours(pair, strength, caplog):
    """In float32 within 1e-5, in float16 at most one unit in the last place away."""
    compare(pair, strength, caplog, close if pair.denoiser.dtype == torch.float32 else close_in_half)


def test_the_exponential(tmp_path, caplog):
    pair = Pair(FAMILIES["SD 1.5"], torch.float32, tmp_path, "exp")
    compare(pair, 1.0, caplog, close)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=0)
