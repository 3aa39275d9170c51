"""Frozen layers in eight bits or in main memory: that they do what their numbers do, and keep nothing else."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel
from tiny_families import WRITERS, prediction_and_gradients
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.pretended_gpu import PretendedGPU, bytes_in_use
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import find_attentions, find_linears
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import FAMILIES, BaseModel
from gsoft_diffusion.models.frozen_storage import FLOAT8, StoredLinear, store, stored_layers
from gsoft_diffusion.models.loading import load_model

WIDTH = 64


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def folder(request, tmp_path_factory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("stored") / "base")


def stored(model: BaseModel, **how: bool) -> BaseModel:
    """The same model with its denoiser's layers stored like this."""
    model = copy.copy(model)
    model.transformer = model.unet = copy.deepcopy(model.denoiser)
    store(model.denoiser, True, **how)
    return model


def with_plain_layers(model: nn.Module) -> nn.Module:
    """A copy with ordinary layers that hold the numbers that the stored ones stand for."""
    model = copy.deepcopy(model)
    for path, layer in stored_layers(model, True).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = nn.Parameter(layer.weight.to(layer.scale.dtype) * layer.scale, requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_in_eight_bits_do_what_their_numbers_do(folder, dtype):
    """Prediction and gradients are those of a model with these numbers in ordinary layers, and near the base's."""
    eight, plain = load_model(str(folder), dtype=dtype, quantize_base="float8"), load_model(str(folder), dtype=dtype)
    by_hand = copy.copy(eight)
    by_hand.transformer = by_hand.unet = with_plain_layers(eight.denoiser)
    assert eight.dtype == plain.dtype
    # Processes that train together send each other a model's parameters and buffers, and gloo knows no eight bits.
    sent = (tensor for part in (eight.denoiser, *eight.all_text_encoders()) for tensor in part.state_dict().values())
    assert FLOAT8 not in {tensor.dtype for tensor in sent}
    assert identity_of(eight) == identity_of(plain)
    for reader in eight.all_text_encoders():
        assert any(isinstance(each, StoredLinear) for each in reader.modules()) != (reader in eight.text_encoders)
    found, gradients = prediction_and_gradients(eight)
    wanted, wanted_gradients = prediction_and_gradients(by_hand)
    torch.testing.assert_close(found, wanted)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], msg=name)
    before, _ = prediction_and_gradients(plain)
    assert 0 < (found - before).norm() < 0.2 * before.norm()


def test_layers_in_main_memory_give_the_same_numbers(folder):
    plain = load_model(str(folder))
    offloaded = stored(plain, float8=False, in_main_memory=True)
    assert identity_of(offloaded) == identity_of(plain)
    found, gradients = prediction_and_gradients(offloaded)
    wanted, wanted_gradients = prediction_and_gradients(plain)
    assert torch.equal(found, wanted)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], msg=name)


def test_what_is_adapted_stays_as_it_was(folder):
    plain, eight = load_model(str(folder)), load_model(str(folder), quantize_base="float8")
    adapted = find_linears(find_attentions(plain.denoiser), {})
    for name, linear in find_linears(find_attentions(eight.denoiser), {}).items():
        assert torch.equal(linear.weight, adapted[name].weight), name
    assert any(isinstance(module, StoredLinear) for module in eight.denoiser.modules())


@pytest.mark.parametrize("size", [1e-6, 0.02, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rounding_is_that_of_eight_bits(size, dtype):
    """Three digits after the point of a binary number: 2.6 % of a normal weight, of whatever size; and zero stays."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 128, bias=False).requires_grad_(False)
    nn.init.normal_(linear.weight, std=size)
    linear.weight[5] = 0
    layer = StoredLinear(linear.to(dtype), float8=True, in_main_memory=False)
    back = with_plain_layers(nn.Sequential(layer))[0].weight
    error = ((back.float() - linear.weight.float()).norm() / linear.weight.float().norm()).item()
    assert 0.024 < error < 0.029
    assert (back[5] == 0).all()
    assert layer.weight.nbytes == linear.weight.numel()


def test_tiny_weights_in_float16_stay_finite():
    """The power of two that fits a row below 2.7e-5 is 0 in float16."""
    linear = nn.Linear(4, 3, bias=False).half().requires_grad_(False)
    linear.weight.copy_(torch.tensor([[2e-5, 0, -1e-5, 5e-6], [1e-6, 0, 0, 0], [0.02, 0, 0, 0]]))
    layer = StoredLinear(linear, float8=True, in_main_memory=False)
    x = torch.full((1, 4), 1000.0).half()
    torch.testing.assert_close(layer(x), linear(x), rtol=0.1, atol=0)


def layers() -> nn.Sequential:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(8)).requires_grad_(False)
    model = nn.Module()
    model.blocks = blocks
    model.forward = lambda x: nn.Sequential(*blocks)(x)
    return model


@pytest.mark.parametrize(
    ("float8", "in_main_memory", "kept"), [(False, True, 0), (True, False, 8 * WIDTH * WIDTH), (True, True, 0)]
)
def test_the_gpu_holds_no_more_than_what_is_stored_there(float8, in_main_memory, kept):
    """From the forward to the backward pass, beside the activations."""
    gc.collect()  # what earlier tests left on the pretended GPU
    others = bytes_in_use()
    with PretendedGPU():
        model = layers()
        store(model, True, float8=float8, in_main_memory=in_main_memory)
        model.to("cuda")
        before = bytes_in_use()
        assert kept <= before - others < kept + 8 * WIDTH * 8 + 1000  # biases and scales
        x = torch.ones(1, WIDTH, device="cuda", requires_grad=True)
        y = model(x)
        assert bytes_in_use() - before < WIDTH * WIDTH
        y.sum().backward()
        assert x.grad.cpu().abs().max() > 0
        assert bytes_in_use() - before < WIDTH * WIDTH


def test_it_compiles_to_one_graph():
    model = layers()
    store(model, True, float8=True, in_main_memory=False)
    counter = CompileCounterWithBackend("eager")
    x = torch.randn(3, WIDTH, requires_grad=True)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_layers_of_the_published_models():
    """By hand: feed-forward and modulation layers of Z-Image's blocks; of FLUX those that may have four bits."""
    with torch.device("meta"):
        z_image, flux = ZImageTransformer2DModel(), FluxTransformer2DModel(guidance_embeds=True)
    width = 3840
    wanted = 34 * 3 * width * (width * 8 // 3) + 32 * 256 * 4 * width
    assert sum(layer.weight.numel() for layer in stored_layers(z_image, True).values()) == wanted == 4_136_632_320
    assert sum(layer.weight.numel() for layer in stored_layers(flux, True).values()) == 9_323_937_792


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "--offload_layers: there is no GPU with memory of its own here"),
        ({"device": "cuda", "quantize_base": "nf4"}, "--offload_layers: the layers of --quantize_base nf4 cannot"),
    ],
)
def test_what_cannot_be_offloaded_is_said_before_anything_is_loaded(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "nowhere"), offload_layers=True, **options)
