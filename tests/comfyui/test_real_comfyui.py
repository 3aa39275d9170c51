"""ComfyUI's own LoRA loader reads our adapter's file, with the node pack in place.

COMFYUI=~/ComfyUI python -m pytest tests/comfyui/test_real_comfyui.py    # a checkout whose requirements are installed

The models have the real structure of each family, scaled down, with random weights.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_pack import PACK, close, close_in_half
from conftest import write_base
from other_programs import STRUCTURES, Tensors, Trained
from tiny_models import randomise
from torch import Tensor, nn

from gsoft_diffusion import inject, save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.config import AdapterConfig, ExportConfig
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.models.original_layout import unet_tensors
from gsoft_diffusion.publish.export import export

pytestmark = pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI names no checkout of ComfyUI")

STRENGTHS = (0.5, 1.0, 1.5)


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


# ComfyUI's classes: of the denoiser for its weights, and of the text encoders
FAMILIES: dict[str, tuple[Callable[[Tensors], nn.Module], Callable[[Sequence[nn.Module]], nn.Module | None]]] = {
    "SD 1.5": (detected("SD15"), sd1_clip),
    "SDXL": (detected("SDXL"), sdxl_clip),
    "SD 3.5": (detected("SD3"), lambda encoders: None),
    "FLUX.1": (flux_model, lambda encoders: None),
}


class Pair:
    """A base model with an adapter of ours, and the same base model in ComfyUI."""

    def __init__(self, family: str, dtype: torch.dtype, folder: Path, parametrization: str = "cayley") -> None:
        self.trained = Trained(STRUCTURES[family], dtype, folder, parametrization)
        make_model, make_clip = FAMILIES[family]
        weights = self.trained.names()
        self.model, self.clip = make_model(weights), make_clip(self.trained.encoders)
        _, unknown = self.model.diffusion_model.load_state_dict(weights, strict=False)
        assert not unknown
        if self.clip is not None:
            _, unknown = self.clip.load_state_dict(self.trained.clip_names(), strict=False)
            assert not unknown

    def check(self, strength: float, caplog, close: Callable[[Tensor, Tensor], bool]) -> None:
        """Fail unless ComfyUI's weights are close to ours, and it has nothing to complain of."""
        with caplog.at_level(logging.WARNING):
            found = self.patched(strength)
        assert not [message for message in caplog.messages if "not loaded" in message or "gsoft" in message]
        self.trained.check(found, strength, close)

    def patched(self, strength: float, file: Path | None = None) -> Tensors:
        """ComfyUI's weights, after its node for LoRAs; of our adapter's file, unless another is given."""
        file = file or self.trained.file
        place = torch.device("cpu")
        model = comfy().model_patcher.ModelPatcher(self.model, load_device=place, offload_device=place)
        clip = None
        if self.clip is not None:
            clip = comfy().sd.CLIP(no_init=True)
            clip.cond_stage_model, clip.tokenizer, clip.layer_idx = self.clip, None, None
            clip.tokenizer_options, clip.use_clip_schedule, clip.apply_hooks_to_conds = {}, False, None
            clip.patcher = comfy().model_patcher.ModelPatcher(self.clip, load_device=place, offload_device=place)
        comfy().folder_paths.add_model_folder_path("loras", str(file.parent), is_default=True)
        loaded = comfy().nodes.LoraLoader().load_lora(model, clip, file.name, strength, strength)
        tensors: Tensors = {}
        for patcher in (loaded[0], *([loaded[1].patcher] if clip else [])):
            patched = patcher.patch_model(device_to=place)
            tensors |= {name: tensor.detach().clone() for name, tensor in patched.state_dict().items()}
            patcher.unpatch_model(device_to=place)
        return tensors


@pytest.fixture(
    scope="module", params=[(name, dtype) for name in FAMILIES for dtype in ("float32", "float16")], ids="-".join
)
def pair(request, tmp_path_factory) -> Pair:
    name, dtype = request.param
    return Pair(name, getattr(torch, dtype), tmp_path_factory.mktemp("loras"))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_weights_are_ours(pair, strength, caplog):
    """In float32 within 1e-5, in float16 at most one unit in the last place away."""
    pair.check(strength, caplog, close if pair.trained.denoiser.dtype == torch.float32 else close_in_half)


def test_the_exponential(tmp_path, caplog):
    Pair("SD 1.5", torch.float32, tmp_path, "exp").check(1.0, caplog, close)


def test_full_differences(tmp_path, caplog):
    """An export that ComfyUI reads without the pack: as near as float16 holds the differences."""
    pair = Pair("SD 1.5", torch.float32, tmp_path)
    base = write_base(tmp_path / "base")
    pair.trained.denoiser.save_pretrained(base / "unet")
    model = load_model(str(base))
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), model.unet)
    randomise(adapter)
    file = tmp_path / "of_unet.safetensors"
    save_adapter(file, adapter, base_model=identity_of(load_model(str(base))), training={}, prompts={})
    differences = export(ExportConfig((str(file),), "diff", output=str(tmp_path / "difference.safetensors")))
    with caplog.at_level(logging.WARNING):
        found = pair.patched(1.0, differences)
    assert not [message for message in caplog.messages if "not loaded" in message]
    untouched = {name: tensor.clone() for name, tensor in unet_tensors(model.unet).items()}
    adapter.merge()
    for name, wanted in unet_tensors(model.unet).items():
        change = (wanted - untouched[name]).norm()
        assert (found[f"diffusion_model.{name}"] - wanted).norm() <= 1e-3 * change + 1e-6
        assert change > 0.1 or not name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
