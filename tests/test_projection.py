from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tiny_models import randomise
from torch import nn
from torch.nn import functional as F

from gsoft_diffusion import AdapterConfig, UserError
from gsoft_diffusion.group_and_shuffle import dense_reference
from gsoft_diffusion.projection import GSOFTLinear, GSOFTProjection, parameter_count

CONFIGS = [
    AdapterConfig(
        nblocks=nblocks, nfactors=nfactors, double=double, parametrization=parametrization, output_scale=scale
    )
    for nblocks, nfactors, double, parametrization, scale in itertools.product(
        [4, 8], [1, 2, "dense"], [True, False], ["cayley", "exp"], [True, False]
    )
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_and_projection(
    config: AdapterConfig | None = None, dtype: torch.dtype = torch.float32, bias: bool = True, trained: bool = True
) -> tuple[nn.Linear, GSOFTProjection]:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    projection = GSOFTProjection(config or AdapterConfig(nblocks=4), 24, 40)
    if trained:
        randomise(projection)
    return linear, projection


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_computes_the_definition(config):
    """y = s·(Q_out W Q_in x) + bias with dense matrices."""
    linear, projection = layer_and_projection(config)
    x = torch.randn(2, 5, 24)
    q_in, q_out = projection.rotations()
    rotated = linear.weight.double() @ dense_reference(q_in.double())
    if config.double:
        rotated = dense_reference(q_out.double()) @ rotated
    y = x.double() @ rotated.mT
    if config.output_scale:
        y = projection.output_scale * y
    torch.testing.assert_close(projection(linear, x), (y + linear.bias).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_counts_follow_the_closed_form(config):
    _, projection = layer_and_projection(config)
    count = sum(parameter.numel() for parameter in projection.parameters())
    assert count == parameter_count(config, 24, 40)
    if config.nfactors != "dense":
        b_in, b_out = 24 // config.nblocks, 40 // config.nblocks
        by_hand = config.nfactors * config.nblocks * b_in * (b_in - 1) // 2
        by_hand += config.nfactors * config.nblocks * b_out * (b_out - 1) // 2 if config.double else 0
        assert count == by_hand + (40 if config.output_scale else 0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_bit_equal_to_the_plain_layer(config, dtype):
    linear, projection = layer_and_projection(config, dtype, trained=False)
    x = torch.randn(3, 24).to(dtype)
    assert torch.equal(projection(linear, x), linear(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(projection(linear, x), linear(x))


@pytest.mark.parametrize("config", [config for config in CONFIGS if not config.output_scale], ids=str)
def test_singular_values_are_kept_without_the_scale(config):
    linear, projection = layer_and_projection(config)
    rotated = projection.rotated_weight(linear.weight)
    assert (rotated - linear.weight).abs().max() > 0.05
    torch.testing.assert_close(torch.linalg.svdvals(rotated), torch.linalg.svdvals(linear.weight), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_stays_orthogonal_after_optimizer_steps(config):
    linear, projection = layer_and_projection(config, trained=False)
    assert projection.orthogonality_error() == 0
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.1)
    for _ in range(10):
        projection(linear, torch.randn(8, 24)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert projection.orthogonality_error() < 1e-5
    assert (projection.rotated_weight(linear.weight) - linear.weight).abs().max() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_merge_and_unmerge(dtype):
    linear, projection = layer_and_projection(dtype=dtype)
    x, before = torch.randn(3, 24).to(dtype), linear.weight.clone()
    unmerged = projection(linear, x)
    projection.merge(linear)
    assert not torch.equal(linear.weight, before)
    assert torch.equal(linear(x), unmerged)
    assert torch.equal(projection(linear, x), unmerged)
    projection.merge(linear)  # a second time changes nothing
    assert torch.equal(linear(x), unmerged)
    projection.unmerge(linear)
    assert torch.equal(linear.weight, before)
    assert torch.equal(projection(linear, x), unmerged)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("tokens", [1, 3, 10_000])
def test_training_and_sampling_see_the_same_layer(dtype, tolerance, tokens):
    """In training the activations are rotated where that is cheaper, which rounds in the layer's dtype."""
    linear, projection = layer_and_projection(dtype=dtype)
    x = torch.randn(tokens, 24).to(dtype)
    in_training = projection(linear, x)
    assert in_training.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(in_training, projection(linear, x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_has_the_plain_layers_dtype(dtype):
    linear, projection = layer_and_projection(dtype=dtype)
    x = torch.randn(3, 24).to(dtype)
    assert projection(linear, x).dtype == linear(x).dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projection(linear, x.float()).dtype == linear(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_float32_and_leave_the_base_alone(dtype):
    linear, projection = layer_and_projection(dtype=dtype)
    projection(linear, torch.randn(3, 24).to(dtype)).float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in projection.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in projection.parameters())
    assert linear.weight.grad is None


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_a_parent_does_not_cast_what_is_trained(cast):
    _, projection = layer_and_projection()
    before = copy.deepcopy(projection.state_dict())
    cast(nn.ModuleList([projection]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in projection.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in projection.parameters())


def test_moving_a_parent_moves_what_is_trained():
    _, projection = layer_and_projection()
    nn.ModuleList([projection]).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in projection.parameters()} == {("meta", torch.float32)}


def test_another_device_than_the_models_is_a_clear_error():
    linear, projection = layer_and_projection()
    with pytest.raises(UserError, match=r"adapter is on meta, the model on cpu.*adapter.to"):
        projection.to("meta")(linear, torch.randn(3, 24))


class TestGSOFTLinear:
    def test_looks_like_the_layer_it_stands_in_for(self):
        linear, projection = layer_and_projection()
        wrapped = GSOFTLinear(linear, projection)
        assert wrapped.weight is linear.weight
        assert wrapped.bias is linear.bias
        assert (wrapped.in_features, wrapped.out_features) == (24, 40)
        assert list(wrapped.state_dict()) == ["weight", "bias"]
        assert list(wrapped.parameters()) == [linear.weight, linear.bias]
        assert wrapped.unwrapped() is linear

    def test_rotates_then_adds_the_bias(self):
        linear, projection = layer_and_projection()
        wrapped, x = GSOFTLinear(linear, projection), torch.randn(3, 24)
        with torch.no_grad():
            assert torch.equal(wrapped(x), F.linear(x, projection.rotated_weight(linear.weight), linear.bias))
        torch.testing.assert_close(wrapped(torch.zeros(1, 24))[0], linear.bias)
        projection.enabled = False
        assert torch.equal(wrapped(x), linear(x))

    @torch.no_grad()
    def test_merge_and_copy(self):
        linear, projection = layer_and_projection()
        wrapped, x = GSOFTLinear(linear, projection), torch.randn(3, 24)
        rotated = wrapped(x)
        projection.merge(wrapped)
        assert torch.equal(wrapped(x), rotated)
        assert torch.equal(linear(x), rotated)
        projection.unmerge(wrapped)
        copied = copy.deepcopy(wrapped)
        randomise(projection, seed=1)
        assert torch.equal(copied(x), rotated)
        assert not torch.equal(wrapped(x), rotated)


def test_an_adapter_put_on_top_is_refused_rather_than_ignored():
    class OtherAdapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    linear, projection = layer_and_projection()
    with pytest.raises(UserError, match="merge the GSOFT adapter"):
        projection(OtherAdapter(linear), torch.randn(1, 24))
    projection.merge(linear)
    x = torch.randn(1, 24)
    assert torch.equal(projection(OtherAdapter(linear), x), linear(x) + 1)
