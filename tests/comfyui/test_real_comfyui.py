"""ComfyUI's own LoRA loader reads our adapter's file, with the node pack in place.

COMFYUI=~/ComfyUI python -m pytest tests/comfyui/test_real_comfyui.py    # a checkout whose requirements are installed

The models have the real structure of each family, scaled down, with random weights.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_pack import PACK, close, close_in_half
from conftest import write_base
from other_programs import ATTENTION, STRUCTURES, Tensors, Trained
from safetensors.torch import load_file
from tiny_families import write_flux2_klein, write_z_image
from tiny_models import randomise
from torch import Tensor, nn
from torch.nn import functional

from gsoft_diffusion import inject, save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.config import AdapterConfig, ExportConfig
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.export import export

pytestmark = pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI names no checkout of ComfyUI")

STRENGTHS = (0.5, 1.0, 1.5)
PLACE = torch.device("cpu")
MakeModel = Callable[[Tensors], nn.Module]


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


def detected(kind: str, signs: Mapping[str, tuple[int, ...]] | None = None, **sizes: object) -> MakeModel:
    """ComfyUI's model of this kind, in the sizes that it finds in the weights itself.

    signs: further weights that it looks for, and their shapes. sizes: what it has one value for.
    """

    def make(tensors: Tensors) -> nn.Module:
        if not hasattr(comfy().supported_models, kind):
            pytest.skip(f"this version of ComfyUI does not know {kind}")
        found = tensors | {name: torch.zeros(shape) for name, shape in (signs or {}).items()}
        config = comfy().model_detection.detect_unet_config(found, "") | sizes
        return getattr(comfy().supported_models, kind)(
            config | {"dtype": next(iter(tensors.values())).dtype}
        ).get_model(tensors)

    return make


def sd1_clip(encoders: Sequence[nn.Module]) -> nn.Module:
    return comfy().sd1_clip.SD1ClipModel(
        dtype=encoders[0].dtype, model_options={"clip_l_model_config": encoders[0].config.to_dict()}
    )


def sdxl_clip(encoders: Sequence[nn.Module]) -> nn.Module:
    names = ("clip_l_model_config", "clip_g_model_config")
    configs = {name: encoder.config.to_dict() for name, encoder in zip(names, encoders, strict=True)}
    return comfy().sdxl_clip.SDXLClipModel(dtype=encoders[0].dtype, model_options=configs)


FLUX_SIGNS = {
    "img_in.weight": (128, 16),
    "txt_in.weight": (128, 48),
    "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
}
FLUX_SIZES = {"hidden_size": 128, "num_heads": 1, "context_in_dim": 48}


# ComfyUI's classes: of the denoiser for its weights, and of the text encoders
FAMILIES: dict[str, tuple[MakeModel, Callable[[Sequence[nn.Module]], nn.Module | None]]] = {
    "SD 1.5": (detected("SD15"), sd1_clip),
    "SDXL": (detected("SDXL"), sdxl_clip),
    "SD 3.5": (detected("SD3"), lambda encoders: None),
    "FLUX.1": (
        detected("Flux", FLUX_SIGNS | {"vector_in.in_layer.weight": (128, 32)}, **FLUX_SIZES),
        lambda encoders: None,
    ),
    "FLUX.2": (
        detected("Flux2", FLUX_SIGNS | {"double_stream_modulation_img.lin.weight": (768, 128)}, **FLUX_SIZES),
        lambda encoders: None,
    ),
    "Z-Image": (
        detected(
            "ZImage",
            {"cap_embedder.1.weight": (3840, 16), "noise_refiner.0.attention.k_norm.weight": (32,)},
            **{"dim": 64, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12]},
        ),
        lambda encoders: None,
    ),
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
        comfy().folder_paths.add_model_folder_path("loras", str(file.parent), is_default=True)
        loaded = comfy().nodes.LoraLoader().load_lora(*self.as_nodes_have_it(), file.name, strength, strength)
        tensors: Tensors = {}
        for patcher in (loaded[0], *([loaded[1].patcher] if loaded[1] else [])):
            patched = patcher.patch_model(device_to=PLACE)
            tensors |= {name: tensor.detach().clone() for name, tensor in patched.state_dict().items()}
            patcher.unpatch_model(device_to=PLACE)
        return tensors

    def as_nodes_have_it(self) -> tuple[Any, Any]:
        """The denoiser and, where there are, the text encoders, as ComfyUI's nodes hand them on."""
        model = comfy().model_patcher.ModelPatcher(self.model, load_device=PLACE, offload_device=PLACE)
        if self.clip is None:
            return model, None
        clip = comfy().sd.CLIP(no_init=True)
        clip.cond_stage_model, clip.tokenizer, clip.layer_idx = self.clip, None, None
        clip.tokenizer_options, clip.use_clip_schedule, clip.apply_hooks_to_conds = {}, False, None
        clip.patcher = comfy().model_patcher.ModelPatcher(self.clip, load_device=PLACE, offload_device=PLACE)
        return model, clip


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


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_outputs_are_ours_where_weights_are_left_alone(family, strength, tmp_path):
    """With ComfyUI's loader that has layers compute with the adapter instead of changing their weights (bypass)."""
    if not hasattr(comfy().sd, "load_bypass_lora_for_models"):
        pytest.skip("this version of ComfyUI has no such loader")
    pair = Pair(family, torch.float32, tmp_path)
    wanted, base = pair.trained.rotated(strength), pair.trained.rotated(0.0)
    changed = {name for name in wanted if not torch.equal(wanted[name], base[name])}
    assert len(changed) > 20
    model, clip = pair.as_nodes_have_it()
    tensors = load_file(pair.trained.file)
    for loaded in comfy().sd.load_bypass_lora_for_models(model, clip, tensors, strength, strength):
        patcher = getattr(loaded, "patcher", loaded)
        patcher.inject_model()
        for name in changed & patcher.model.state_dict().keys():
            layer = patcher.model.get_submodule(name.removesuffix(".weight"))
            x = torch.randn(3, 5, layer.in_features)
            torch.testing.assert_close(layer(x), functional.linear(x, wanted[name], layer.bias), rtol=1e-4, atol=1e-5)
            changed.remove(name)
        patcher.eject_model()
    assert not changed


def test_the_exponential(tmp_path, caplog):
    Pair("SD 1.5", torch.float32, tmp_path, "exp").check(1.0, caplog, close)


@pytest.mark.parametrize(
    ("family", "write", "part"),
    [
        ("SD 1.5", write_base, "unet"),
        ("FLUX.2", write_flux2_klein, "transformer"),
        ("Z-Image", write_z_image, "transformer"),
    ],
)
def test_full_differences(family, write, part, tmp_path, caplog):
    """An export that ComfyUI reads without the pack: as near as float16 holds the differences."""
    pair = Pair(family, torch.float32, tmp_path)
    base = write(tmp_path / "base")
    pair.trained.denoiser.save_pretrained(base / part)
    model = load_model(str(base))
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), model.denoiser)
    randomise(adapter)
    file = tmp_path / "of_denoiser.safetensors"
    save_adapter(file, adapter, base_model=identity_of(load_model(str(base))), training={}, prompts={})
    differences = export(ExportConfig((str(file),), "diff", output=str(tmp_path / "difference.safetensors")))
    with caplog.at_level(logging.WARNING):
        found = pair.patched(1.0, differences)
    assert not [message for message in caplog.messages if "not loaded" in message]
    names = STRUCTURES[family].names
    untouched = {name: tensor.clone() for name, tensor in names(model.denoiser).items()}
    adapter.merge()
    for name, wanted in names(model.denoiser).items():
        change = (wanted - untouched[name]).norm()
        assert (found[f"diffusion_model.{name}"] - wanted).norm() <= 1e-3 * change + 1e-6
        assert change > 0.1 or not ATTENTION.search(name) or wanted.ndim == 1
