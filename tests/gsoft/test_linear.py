from __future__ import annotations

import copy
import itertools

import pytest
import torch
from plain_models import randomise
from torch import nn
from torch.nn import functional as F

from gsoft import GSOFTError, RotationConfig
from gsoft.cache import RotationCache
from gsoft.group_and_shuffle import dense_reference
from gsoft.linear import RotatedLayer, RotatedLinear, put_on, rotate_together, take_off
from gsoft.products import RotationBlocks
from gsoft.rotation import Rotation, parameter_count

CONFIGS = [
    RotationConfig(
        nblocks=nblocks, nfactors=nfactors, double=double, parametrization=parametrization, output_scale=scale
    )
    for nblocks, nfactors, double, parametrization, scale in itertools.product(
        [4, 8], [1, 2, "dense"], [True, False], ["cayley", "exp"], [True, False]
    )
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_and_rotated(
    config: RotationConfig | None = None, dtype: torch.dtype = torch.float32, bias: bool = True, trained: bool = True
) -> tuple[nn.Linear, RotatedLayer]:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    rotated = RotatedLayer(Rotation(config or RotationConfig(nblocks=4), 24, 40))
    if trained:
        randomise(rotated.rotation)
    return linear, rotated


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_computes_the_definition(config):
    """y = s·(Q_out W Q_in x) + bias with dense matrices."""
    linear, rotated = layer_and_rotated(config)
    x = torch.randn(2, 5, 24)
    q_in, q_out, output_scale = rotated.blocks()
    weight = linear.weight.double() @ dense_reference(q_in.double())
    if config.double:
        weight = dense_reference(q_out.double()) @ weight
    y = x.double() @ weight.mT
    if config.output_scale:
        y = output_scale * y
    torch.testing.assert_close(rotated(linear, x), (y + linear.bias).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_counts_follow_the_closed_form(config):
    _, rotated = layer_and_rotated(config)
    count = sum(parameter.numel() for parameter in rotated.rotation.parameters())
    assert count == parameter_count(config, 24, 40)
    if config.nfactors != "dense":
        b_in, b_out = 24 // config.nblocks, 40 // config.nblocks
        by_hand = config.nfactors * config.nblocks * b_in * (b_in - 1) // 2
        by_hand += config.nfactors * config.nblocks * b_out * (b_out - 1) // 2 if config.double else 0
        assert count == by_hand + (40 if config.output_scale else 0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_bit_equal_to_the_plain_layer(config, dtype):
    linear, rotated = layer_and_rotated(config, dtype, trained=False)
    x = torch.randn(3, 24).to(dtype)
    assert torch.equal(rotated(linear, x), linear(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotated(linear, x), linear(x))


@pytest.mark.parametrize("config", [config for config in CONFIGS if not config.output_scale], ids=str)
def test_singular_values_are_kept_without_the_scale(config):
    linear, rotated = layer_and_rotated(config)
    weight = rotated.rotated_weight(linear.weight)
    assert (weight - linear.weight).abs().max() > 0.05
    torch.testing.assert_close(torch.linalg.svdvals(weight), torch.linalg.svdvals(linear.weight), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_stays_orthogonal_after_optimizer_steps(config):
    linear, rotated = layer_and_rotated(config, trained=False)
    assert rotated.orthogonality_error() == 0
    optimizer = torch.optim.Adam(rotated.rotation.parameters(), lr=0.1)
    for _ in range(10):
        rotated(linear, torch.randn(8, 24)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert rotated.orthogonality_error() < 1e-5
    assert (rotated.rotated_weight(linear.weight) - linear.weight).abs().max() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_merge_and_unmerge(dtype):
    linear, rotated = layer_and_rotated(dtype=dtype)
    x, before = torch.randn(3, 24).to(dtype), linear.weight.clone()
    unmerged = rotated(linear, x)
    rotated.merge(linear)
    assert not torch.equal(linear.weight, before)
    assert torch.equal(linear(x), unmerged)
    assert torch.equal(rotated(linear, x), unmerged)
    rotated.merge(linear)  # a second time changes nothing
    assert torch.equal(linear(x), unmerged)
    rotated.unmerge(linear)
    assert torch.equal(linear.weight, before)
    assert torch.equal(rotated(linear, x), unmerged)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("tokens", [1, 3, 10_000])
def test_training_and_sampling_see_the_same_layer(dtype, tolerance, tokens):
    """In training the activations are rotated where that is cheaper, which rounds in the layer's dtype."""
    linear, rotated = layer_and_rotated(dtype=dtype)
    x = torch.randn(tokens, 24).to(dtype)
    in_training = rotated(linear, x)
    assert in_training.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(in_training, rotated(linear, x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (1, 24), (2, 3, 24)])
def test_inputs_of_any_shape(shape):
    linear, rotated = layer_and_rotated()
    x = torch.randn(shape, requires_grad=True)
    assert rotated.rotates_activations(linear, x) or not x.numel()
    y = rotated(linear, x)
    y.sum().backward()
    assert x.grad.shape == shape
    with torch.no_grad():
        torch.testing.assert_close(y, rotated(linear, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_has_the_plain_layers_dtype(dtype):
    linear, rotated = layer_and_rotated(dtype=dtype)
    x = torch.randn(3, 24).to(dtype)
    assert rotated(linear, x).dtype == linear(x).dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rotated(linear, x.float()).dtype == linear(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_float32_and_leave_the_base_alone(dtype):
    linear, rotated = layer_and_rotated(dtype=dtype)
    rotated(linear, torch.randn(3, 24).to(dtype)).float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in rotated.rotation.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in rotated.rotation.parameters())
    assert linear.weight.grad is None


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_a_parent_does_not_cast_what_is_trained(cast):
    _, rotated = layer_and_rotated()
    before = copy.deepcopy(rotated.rotation.state_dict())
    cast(nn.ModuleList([rotated.rotation]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in rotated.rotation.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in rotated.rotation.parameters())


def test_moving_a_parent_moves_what_is_trained():
    _, rotated = layer_and_rotated()
    nn.ModuleList([rotated.rotation]).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in rotated.rotation.parameters()} == {("meta", torch.float32)}


def test_another_device_than_the_models_is_a_clear_error():
    linear, rotated = layer_and_rotated()
    rotated.rotation.to("meta")
    with pytest.raises(GSOFTError, match=r"adapter is on meta, the model on cpu.*adapter.to"):
        rotated(linear, torch.randn(3, 24))


@pytest.mark.parametrize("how", ["together", "alone", "off", "merged", "without gradients"])
def test_several_layers_of_one_input(how):
    """Equal to one by one, whether or not they are computed together."""
    torch.manual_seed(0)
    linears = [nn.Linear(400, 1200).requires_grad_(False) for _ in range(3)]
    layers = [RotatedLayer(Rotation(RotationConfig(nblocks=20), 400, 1200)) for _ in linears]
    for seed, rotated in enumerate(layers):
        randomise(rotated.rotation, seed, size=0.05)
    if how != "alone":
        cache = RotationCache([rotated.rotation for rotated in layers], linears)
        for index, rotated in enumerate(layers):
            rotated.share(cache, index)
    if how == "off":
        layers[1].enabled = False
    if how == "merged":
        layers[1].merge(linears[1])
    x = torch.randn(5, 400, requires_grad=True)
    assert layers[0].rotates_activations(linears[0], x)
    with torch.set_grad_enabled(how != "without gradients"):
        made = rotate_together(layers, linears, x)
        expected = [rotated(linear, x) for rotated, linear in zip(layers, linears, strict=True)]
    for ours, one in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, one)


def test_layers_that_rotated_together_have_no_weights_made_for_the_next_pass():
    linears = [nn.Linear(400, 1200).requires_grad_(False) for _ in range(3)]
    layers = [RotatedLayer(Rotation(RotationConfig(nblocks=20), 400, 1200)) for _ in linears]
    cache = RotationCache([rotated.rotation for rotated in layers], linears)
    for index, rotated in enumerate(layers):
        rotated.share(cache, index)
    rotate_together(layers, linears, torch.randn(5, 400))
    for linear, rotated in zip(linears, layers, strict=True):
        rotated.prepare(linear)
        assert isinstance(rotated.prepared, RotationBlocks)


class TestRotatedLinear:
    def test_stays_the_layer_that_it_was(self):
        linear, rotated = layer_and_rotated()
        weight, bias = linear.weight, linear.bias
        assert put_on(linear, rotated) is linear
        assert isinstance(linear, RotatedLinear)
        assert (linear.weight is weight, linear.bias is bias) == (True, True)
        assert list(linear.state_dict()) == ["weight", "bias"]
        assert list(linear.parameters()) == [weight, bias]
        assert not list(linear.children())
        take_off(linear)
        assert type(linear) is nn.Linear
        assert vars(linear).keys() == vars(nn.Linear(1, 1)).keys()

    def test_keeps_its_hooks(self):
        linear, rotated = layer_and_rotated()
        seen = []
        linear.register_forward_hook(lambda *arguments: seen.append(arguments))
        put_on(linear, rotated)
        linear(torch.randn(3, 24))
        assert len(seen) == 1

    def test_rotates_then_adds_the_bias(self):
        linear, rotated = layer_and_rotated()
        x, plain = torch.randn(3, 24), linear(torch.zeros(1, 24))
        put_on(linear, rotated)
        with torch.no_grad():
            assert torch.equal(linear(x), F.linear(x, rotated.rotated_weight(linear.weight), linear.bias))
        torch.testing.assert_close(linear(torch.zeros(1, 24)), plain)
        rotated.enabled = False
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))

    @torch.no_grad()
    def test_merge_and_copy(self):
        linear, rotated = layer_and_rotated()
        x = torch.randn(3, 24)
        expected = put_on(linear, rotated)(x)
        rotated.merge(linear)
        assert torch.equal(linear(x), expected)
        take_off(linear)
        assert torch.equal(linear(x), expected)
        rotated.unmerge(put_on(linear, rotated))
        copied = copy.deepcopy(linear)
        randomise(rotated.rotation, seed=1)
        assert torch.equal(copied(x), expected)
        assert not torch.equal(linear(x), expected)
