"""A base in four bits: which layers, that they do what they say, and that adapters do not notice.

Really run, on the CPU, where bitsandbytes is installed.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import PIXELS
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from tiny_families import WRITERS, prediction_and_gradients
from torch import nn

from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import find_attentions, find_linears
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config import AdapterConfig, ExportConfig, TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models import loading as models_module
from gsoft_diffusion.models.families import FAMILIES, StableDiffusion3
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.models.quantization import quantizable, quantize
from gsoft_diffusion.publish.export import export
from gsoft_diffusion.training.train import train


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def folder(request, tmp_path_factory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("quantised") / "base")


def dequantised(model: nn.Module, bitsandbytes) -> nn.Module:
    """A copy with ordinary layers that hold the numbers that the 4-bit ones stand for."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=weight.dtype)
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            model.set_submodule(path, plain)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_layers_do_what_their_numbers_do(folder, bitsandbytes, dtype):
    """Prediction and gradients are those of a model with these numbers in ordinary layers, and near the base's."""
    quantised = load_model(str(folder), dtype=dtype, quantize_base="nf4")
    plain = load_model(str(folder), dtype=dtype)
    exact, by_hand = copy.copy(plain), copy.copy(plain)
    parts = [name for name, part in vars(quantised).items() if isinstance(part, nn.Module)]
    for name in parts:
        setattr(by_hand, name, dequantised(getattr(quantised, name), bitsandbytes))
    found, gradients = prediction_and_gradients(quantised)
    wanted, wanted_gradients = prediction_and_gradients(by_hand)
    torch.testing.assert_close(found, wanted)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], msg=name)
    before, _ = prediction_and_gradients(exact)
    assert 0 < (found - before).norm() < 0.5 * before.norm()


def test_what_is_adapted_and_what_may_be_stays_as_it_was(folder, bitsandbytes):
    plain, quantised = load_model(str(folder)), load_model(str(folder), quantize_base="nf4")
    four_bits = bitsandbytes.nn.Linear4bit
    adapted = find_linears(find_attentions(plain.denoiser), {})
    for name, linear in find_linears(find_attentions(quantised.denoiser), {}).items():
        assert torch.equal(linear.weight, adapted[name].weight), name
    assert any(isinstance(module, four_bits) for module in quantised.denoiser.modules())
    for encoder, same in zip(plain.text_encoders, quantised.text_encoders, strict=True):
        assert all(map(torch.equal, encoder.parameters(), same.parameters()))
    for reader in quantised.all_text_encoders():
        assert any(isinstance(module, four_bits) for module in reader.modules()) != (reader in quantised.text_encoders)
    assert identity_of(quantised) == identity_of(plain)
    assert quantised.dtype == plain.dtype


def test_t5_keeps_the_layers_whose_dtype_it_asks_for(tmp_path):
    base = load_model(str(WRITERS[StableDiffusion3](tmp_path / "base")))
    found = {path.rpartition(".")[2] for path in quantizable(base.text_encoder_3, True)}
    assert found == {"q", "k", "v", "o", "wi_0", "wi_1"}


def numbers(layers: dict[str, nn.Linear]) -> int:
    return sum(layer.weight.numel() for layer in layers.values())


def test_layers_of_the_published_models():
    """By hand: modulation and feed-forward layers of FLUX, klein's fused ones if they are not adapted; SD 1.5's."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
        klein = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )
        unet = UNet2DConditionModel(cross_attention_dim=768)
    width, wide = 3072, 4 * 3072
    double = 2 * width * 6 * width + 4 * width * wide
    single = width * 3 * width + width * wide + (width + wide) * width
    assert numbers(quantizable(flux, True)) == 19 * double + 38 * single == 9_323_937_792
    assert not [path for path in quantizable(flux, True) if ".attn." in path]
    fused = width * (3 * width + 2 * 3 * width) + (width + 3 * width) * width
    double = 5 * 2 * (width * 6 * width + 3 * width * width)
    assert numbers(quantizable(klein, False)) == double + 20 * fused
    assert numbers(quantizable(klein, True)) == double
    endings = {".".join(path.split(".")[-3:]) for path in quantizable(unet, True) if "transformer_blocks" in path}
    assert endings == {"net.0.proj", "ff.net.2"}
    assert {path.split(".")[-1] for path in quantizable(unet, True)} == {"proj", "2", "time_emb_proj"}


def test_what_is_trained_on_it_is_an_ordinary_adapter(folder, photos, tmp_path, bitsandbytes):
    config = TrainingConfig(
        str(photos),
        class_word="dog",
        output_dir=str(tmp_path / "run"),
        pretrained_model_name_or_path=str(folder),
        adapter=AdapterConfig(nblocks=4, text_encoder=False),
        resolution=PIXELS,
        gradient_checkpointing=True,
        cpu_offload=True,
        quantize_base="nf4",
        max_train_steps=2,
        train_batch_size=1,
        learning_rate=0.1,
        num_validation_images=1,
        validation_prompts=("a dog",),
        report_to="none",
    )
    path = train(config).adapter
    model = load_model(str(folder))
    adapter, file = load_adapter(path, model.denoiser, model.text_encoders)
    assert file.training["quantize_base"] == "nf4"
    assert all(parameter.abs().max() > 0 for parameter in adapter.parameters())
    merged = load_model(str(export(ExportConfig((str(path),), "diffusers", precision="float32"))))
    adapter.merge()
    wanted = model.denoiser.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in merged.denoiser.state_dict().items())


def test_the_rounding_is_that_of_four_bits(bitsandbytes):
    """Relative to a normal weight about 0.095, as for 16 levels at the quantiles of the normal distribution."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 96, bias=False)])
    nn.init.normal_(model[0].weight)
    rounded = copy.deepcopy(nn.Sequential(model))  # the list is what is looked for, by its name in a model
    quantize(rounded, "nf4", "cpu", True)
    rounded = rounded[0]
    assert (rounded[0].in_features, rounded[0].out_features, rounded[2].bias) == (256, 128, None)
    assert torch.equal(rounded[0].bias, model[0].bias)
    weight = bitsandbytes.functional.dequantize_4bit(rounded[0].weight.data, rounded[0].weight.quant_state)
    error = ((weight - model[0].weight).norm() / model[0].weight.norm()).item()
    assert math.isclose(error, 0.095, abs_tol=0.01)
    assert rounded[0].weight.nbytes == model[0].weight.numel() / 2


def test_a_missing_library_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"--quantize_base.*pip install bitsandbytes"):
        load_model(str(tmp_path / "nowhere"), quantize_base="nf4")


def test_weights_must_fit_into_main_memory_where_they_are_quantised(base, bitsandbytes, monkeypatch):
    asked = []
    monkeypatch.setattr(models_module, "check_weights", lambda name, files, device, advice: asked.append(device))
    with pytest.raises(UserError, match="cannot put"):
        load_model(str(base), device="cuda:99", quantize_base="nf4")
    assert asked == ["cpu"]
