"""FLUX.2: the single-stream blocks, whose attention is in slices of matrices shared with the feed-forward layer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PIXELS
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import write_flux2_klein
from tiny_models import randomise, tiny_unet
from training_runs import assert_same, few_steps, weights

from gsoft.rotation import at_strength
from gsoft_diffusion import AdapterStack, load_adapter, read_adapter, save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import Adapter, completed, inject
from gsoft_diffusion.config import AdapterConfig, ExportConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import BaseModel, whole_view
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.export import export
from gsoft_diffusion.training.train import train

CONFIG = AdapterConfig(nblocks=4, text_encoder=False)
DOUBLE = replace(CONFIG, fused_attention=False)  # adapters of before: double-stream blocks only
BLOCK = "transformer.single_transformer_blocks.1.attn"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_flux2_klein(tmp_path_factory.mktemp("flux2") / "base")


@pytest.fixture
def model(base) -> BaseModel:
    return load_model(str(base))


def predict(model: BaseModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape(PIXELS), generator=generator)
    conditioning = model.encode_prompts(["a dog", "a cat"])
    return model.predict(latents, torch.tensor([900.0, 100.0]), conditioning, whole_view(PIXELS, PIXELS).repeat(2, 1))


def write_adapter(model: BaseModel, path: Path, config: AdapterConfig = CONFIG) -> Adapter:
    """An adapter with random angles, in the model and in a file."""
    identity = identity_of(model)
    adapter = inject(config, model.denoiser)
    randomise(adapter, size=0.1)
    save_adapter(path, adapter, base_model=identity, training={}, prompts={})
    return adapter


def as_of_before(path: Path) -> None:
    """Take out of a file's settings what earlier versions did not know."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    del config["fused_attention"]
    save_file(load_file(path), path, metadata | {"config": json.dumps(config)})


@torch.no_grad()
def test_query_key_value_and_output_of_single_stream_blocks_are_rotated_each_by_itself(model):
    block = model.denoiser.single_transformer_blocks[1].attn
    width, before = block.inner_dim, {name: tensor.clone() for name, tensor in block.state_dict().items()}
    adapter = inject(CONFIG, model.denoiser)
    randomise(adapter)
    fused, output = before["to_qkv_mlp_proj.weight"], before["to_out.weight"]
    parts = {"to_q": fused[:width], "to_k": fused[width : 2 * width], "to_v": fused[2 * width : 3 * width]}
    wanted = {name: adapter.rotated(f"{BLOCK}.{name}").rotated_weight(weight) for name, weight in parts.items()}
    attended = adapter.rotated(f"{BLOCK}.to_out").rotated_weight(output[:, :width])
    adapter.merge()
    assert torch.equal(block.to_qkv_mlp_proj.weight, torch.cat([*wanted.values(), fused[3 * width :]]))
    assert torch.equal(block.to_out.weight, torch.cat([attended, output[:, width:]], dim=1))
    assert not torch.allclose(attended, output[:, :width], atol=1e-3)
    adapter.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


@torch.no_grad()
def test_several_adapters_one_of_them_of_before(model, tmp_path):
    """Each is composed on the layers that it is on, and the base model comes back."""
    paths = [tmp_path / name for name in ("whole.safetensors", "double.safetensors")]
    plain = predict(model)
    for path, config in zip(paths, (CONFIG, DOUBLE), strict=True):
        write_adapter(model, path, config).remove()
    stack = AdapterStack(model.denoiser)
    for path in paths:
        stack.load(path.stem, path)
    stack.use({"double": 1.0, "whole": 0.5})
    both = predict(model)
    stack.use({"double": 1.0})
    double = predict(model)
    assert not torch.allclose(both, double, atol=1e-3)
    adapter = inject(CONFIG, model.denoiser)  # around the weights that the other has rotated
    adapter.load_state_dict(at_strength(read_adapter(paths[0]).tensors, 0.5))
    torch.testing.assert_close(predict(model), both, atol=1e-5, rtol=1e-5)
    adapter.remove()
    stack.use({})
    assert torch.equal(predict(model), plain)


@torch.no_grad()
def test_adapters_of_before_load_to_the_bit(model, tmp_path):
    path = tmp_path / "adapter.safetensors"
    adapter = write_adapter(model, path, DOUBLE)
    as_of_before(path)
    expected = predict(model)
    adapter.remove()
    loaded, file = load_adapter(path, model.denoiser)
    assert file.config == DOUBLE
    assert_same(dict(loaded.state_dict()), file.tensors)
    assert not any("single" in name for name in file.tensors)
    assert torch.equal(predict(model), expected)


def test_an_adapter_that_lacks_single_stream_blocks_and_does_not_say_so_is_refused(model, tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_adapter(model, path).remove()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor for name, tensor in load_file(path).items() if "single" not in name}, path, metadata)
    with pytest.raises(UserError, match=r"single_transformer_blocks\.0\.attn\.to_k\.output_scale is missing"):
        load_adapter(path, model.denoiser)


@pytest.mark.slow
def test_runs_of_before_are_resumed_if_that_is_asked_for(base, photos, tmp_path):
    config = replace(few_steps(base, photos, tmp_path / "run"), adapter=DOUBLE)
    whole = weights(config)
    (tmp_path / "run" / "adapter.safetensors").unlink()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    state = torch.load(checkpoint / "state.pt")
    del state["settings"]["adapter"]["fused_attention"]
    torch.save(state, checkpoint / "state.pt")
    names = ("adapter.safetensors", "state.pt")
    sums = [f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))
    resumed = replace(config, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="fused_attention"):
        train(replace(resumed, adapter=CONFIG))
    assert_same(whole, read_adapter(train(resumed).adapter).tensors)


def test_settings_of_models_without_such_blocks_have_it_off():
    assert completed(CONFIG, tiny_unet()) == DOUBLE


def test_settings_of_models_with_such_blocks_keep_what_was_asked_for(model):
    assert completed(CONFIG, model.denoiser) == CONFIG
    assert completed(DOUBLE, model.denoiser) == DOUBLE


def test_a_block_under_another_adapter_is_refused(model):
    inject_adapter_in_model(LoraConfig(target_modules=["to_qkv_mlp_proj"]), model.denoiser)
    with pytest.raises(UserError, match=r"single_transformer_blocks\.0\.attn\.to_q is a Linear.*remove the adapter"):
        inject(CONFIG, model.denoiser)


def test_a_second_adapter_is_refused(model):
    inject(CONFIG, model.denoiser)
    with pytest.raises(UserError, match="is a RotatedLinear: remove the adapter"):
        inject(CONFIG, model.denoiser)


@pytest.mark.parametrize("layout", ["diffusers_lora", "kohya_lora"])
def test_loras_hold_the_slices_in_the_whole_matrices(model, base, layout, tmp_path):
    """At a rank that loses nothing they are the change of the whole matrices, zeros included."""
    path = tmp_path / "adapter.safetensors"
    adapter = write_adapter(model, path)
    block = model.denoiser.single_transformer_blocks[1].attn
    before = {name: getattr(block, name).weight.clone() for name in ("to_qkv_mlp_proj", "to_out")}
    adapter.merge()
    where = {"rank": 32, "precision": "float32", "pretrained_model_name_or_path": str(base)}
    tensors = load_file(export(ExportConfig((str(path),), layout, **where)))
    (down_name, up_name), names = {
        "diffusers_lora": (("lora_A", "lora_B"), {name: f"{BLOCK}.{name}" for name in before}),
        "kohya_lora": (
            ("lora_down", "lora_up"),
            {"to_qkv_mlp_proj": "lora_unet_single_blocks_1_linear1", "to_out": "lora_unet_single_blocks_1_linear2"},
        ),
    }[layout]
    for name, weight in before.items():
        down, up = (tensors[f"{names[name]}.{side}.weight"] for side in (down_name, up_name))
        torch.testing.assert_close(up @ down, getattr(block, name).weight - weight, atol=1e-5, rtol=0)
        assert len(down) == (3 * 32 if name == "to_qkv_mlp_proj" else 32)
