from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gsoft
from gsoft import GSConv2d, GSOFTError, MaxMin, SOCConv2d, plain_copy

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE = 6
LAYERS = {  # inputs, outputs, kernel size, stride; groups, None for SOC
    "equal": ((16, 16, 3), (4, None)),
    "two factors": ((16, 16, 3), (4, 1)),
    "two grouped factors": ((16, 16, 3), (4, 4)),
    "stride": ((8, 16, 3, 2), (4, None)),
    "stride, two factors": ((4, 8, 3, 2), (2, 2)),
    "stride, as many outputs": ((4, 16, 3, 2), (2, 1)),
    "stride, more outputs": ((4, 24, 3, 2), (4, 2)),
    "more outputs": ((8, 24, 3), (4, None)),
    "more outputs, two factors": ((8, 24, 3), (2, 4)),
    "fewer outputs": ((16, 8, 3), (4, None)),
    "fewer outputs, two factors": ((16, 6, 3), (4, 2)),
    "large kernel": ((8, 8, 5), (2, 1)),
    "pointwise": ((8, 16, 1), (4, None)),
    "pointwise, stride, two factors": ((8, 16, 1, 2), (4, 4)),
    "SOC": ((6, 6, 3), None),
    "SOC, one channel": ((1, 1, 3), None),
    "SOC, stride": ((3, 6, 3, 2), None),
    "SOC, more outputs": ((3, 7, 3), None),
    "SOC, pointwise, fewer outputs": ((8, 5, 1), None),
}


def make(name: str, **options: object) -> GSConv2d:
    torch.manual_seed(0)
    shape, groups = LAYERS[name]
    return SOCConv2d(*shape, **options) if groups is None else GSConv2d(*shape, groups=groups, **options)


def trained(layer: GSConv2d) -> GSConv2d:
    """After some steps of gradient descent that move the kernels far."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, layer.layout.in_channels, SIDE, SIDE, generator=generator)
    target = torch.randn(layer(x).shape, generator=generator)
    for _ in range(5):
        (layer(x) * target).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


@torch.no_grad()
def jacobian(layer: nn.Module, inputs: int, side: int = SIDE) -> torch.Tensor:
    pictures = torch.eye(inputs * side**2).unflatten(1, (inputs, side, side))
    return (layer(pictures) - layer(torch.zeros_like(pictures[:1]))).flatten(1).mT


def distance_from_orthogonal(layer: GSConv2d) -> float:
    """The largest difference of a singular value of the layer's matrix from 1, its shorter side's."""
    values = torch.linalg.svdvals(jacobian(layer, layer.layout.in_channels).double())
    return float((values - 1).abs().max())


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_is_orthogonal_within_the_stated_error_fresh_and_trained_in_both_modes(name, paired):
    layer = make(name) if LAYERS[name][1] is None else make(name, paired_shuffle=paired)
    before = copy.deepcopy(layer.state_dict())
    for state in ("fresh", "trained"):
        if state == "trained":
            trained(layer)
            assert all((layer.state_dict()[key] - old).abs().max() > 1e-3 for key, old in before.items())
        for mode, most in ((False, 1.1e-6), (True, 0.027)):
            layer.train(mode)
            stated = layer.lipschitz_bound() - 1
            assert 0 < stated < most
            assert distance_from_orthogonal(layer) <= stated + 3e-6  # and float32's rounding


def test_groups_of_one_channel_learn_their_taps():
    layer = GSConv2d(4, 4, 3, groups=(4, None), paired_shuffle=False)
    assert layer.spatial.free.shape == (4, 4)
    before = layer.spatial.free.detach().clone()
    assert distance_from_orthogonal(trained(layer).eval()) < 4e-6
    assert (layer.spatial.free - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_every_number_learns_and_every_input_matters(name):
    layer = make(name)
    x = torch.randn(3, layer.layout.in_channels, SIDE, SIDE)
    y = layer(x)
    (y * torch.randn(y.shape)).sum().backward()
    assert all((parameter.grad != 0).all() for parameter in layer.parameters())
    assert (jacobian(layer, layer.layout.in_channels).abs().amax(0) > 1e-6).all()


def dealt(channels: int, groups: int, paired: bool) -> list[int]:
    """Which channel comes to each place in a shuffle, by the paper's formulas."""
    size = 2 if paired and groups > 1 else 1
    places = [
        (i // size % groups) * channels // groups + size * (i // (size * groups)) + i % size for i in range(channels)
    ]
    return sorted(range(channels), key=lambda channel: places[channel])


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", [name for name, (_, groups) in LAYERS.items() if groups is not None])
def test_channels_go_where_they_should(name, paired):
    """Space-to-depth, shuffle, zeros in each group, exponential, shuffle, exponential, a part of each group, bias."""
    layer, (first, second) = make(name, paired_shuffle=paired), LAYERS[name][1]
    nn.init.normal_(layer.bias)
    x = torch.randn(2, layer.layout.in_channels, SIDE, SIDE)
    inside, outputs = layer.spatial.channels, layer.layout.out_channels
    unfolded = nn.functional.pixel_unshuffle(x, layer.layout.stride)
    groups = unfolded[:, dealt(unfolded.shape[1], first, paired)].chunk(first, 1)
    y = torch.zeros(2, inside, *unfolded.shape[2:])
    for place, group in zip(y.chunk(first, 1), groups, strict=True):
        place[:, : group.shape[1]] = group
    y = layer.spatial(y)
    if second is not None:
        y = layer.pointwise(y[:, dealt(inside, second, paired)])
    last = second or first
    kept = torch.cat([group[:, : outputs // last] for group in y.chunk(last, 1)], 1)
    torch.testing.assert_close(layer(x), kept + layer.bias[:, None, None])


def test_soc_is_the_exponential_of_its_kernel():
    layer = make("SOC").eval()
    skew = torch.nn.functional.conv2d(
        torch.eye(6 * SIDE**2).unflatten(1, (6, SIDE, SIDE)), layer.spatial.kernel(), padding=1
    )
    expected = torch.matrix_exp(skew.flatten(1).mT.double())
    torch.testing.assert_close(jacobian(layer, 6).double(), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("state", ["loaded", "changed in place"])
def test_nothing_has_to_follow_the_weights(state):
    """Orthogonal in evaluation mode as soon as the weights are others, without a step in between."""
    layer = make("stride").eval()
    other = {key: 5 * torch.randn(value.shape) for key, value in layer.state_dict().items()}
    if state == "loaded":
        layer.load_state_dict(other)
    else:
        with torch.no_grad():
            for key, parameter in layer.named_parameters():
                parameter.copy_(other[key])
    assert [key for key, _ in layer.named_buffers()] == []
    assert distance_from_orthogonal(layer) < 4e-6


def test_scaled_numbers_are_the_same_layer_and_zeros_are_the_identity():
    layer, x = make("equal").eval(), torch.randn(2, 16, SIDE, SIDE)
    before = layer(x)
    with torch.no_grad():
        layer.spatial.free *= 7
    torch.testing.assert_close(layer(x), before)
    soc = SOCConv2d(4, 4, 3).eval()
    nn.init.zeros_(soc.spatial.free)
    y = soc(x[:, :4])
    torch.testing.assert_close(y, x[:, :4])
    y.sum().backward()
    assert soc.spatial.free.grad.isfinite().all()


def test_gradients_are_those_of_the_layer():
    """By central differences of the loss, along the layer's own gradient."""
    layer = make("two factors").double()
    x, target = torch.randn(2, 2, 16, SIDE, SIDE, dtype=torch.float64)
    parameters = [layer.spatial.free, layer.pointwise.free]

    def loss() -> torch.Tensor:
        return (layer(x) * target).sum()

    grads = torch.autograd.grad(loss(), parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        step = 1e-5 * grad / grad.norm()
        with torch.no_grad():
            up = (parameter.add_(step), loss())[1]
            down = (parameter.sub_(2 * step), loss())[1]
            parameter.add_(step)
        # The bound's own gradient is that of the norm that it bounds: nearly the same.
        torch.testing.assert_close((up - down) / 2e-5, grad.norm(), rtol=0.03, atol=0)


def test_pointwise_kernels_are_the_same_map_on_few_and_on_many_pixels():
    layer, x = make("pointwise"), torch.randn(40, 8, 4, 4)
    torch.testing.assert_close(layer(x[:1, :, :1, :1]), layer(x)[:1, :, :1, :1])


def test_half_precision_autocast_and_pictures_without_a_batch():
    layer, x = make("two factors").eval(), torch.randn(2, 16, SIDE, SIDE)
    exact = layer(x)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), exact, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.spatial.kernel().dtype == torch.float32
        torch.testing.assert_close(layer(x).float(), exact, atol=0.1, rtol=0.1)
    torch.testing.assert_close(layer(x[0]), exact[0])


def test_half_of_the_papers_numbers_are_stored():
    assert GSConv2d(16, 16, 3, bias=False).spatial.free.numel() == (16 * 4 * 9 - 16) // 2
    assert SOCConv2d(16, 16, 3).spatial.free.numel() == (16 * 16 * 9 - 16) // 2


def test_what_it_is_made_of():
    layer = GSConv2d(8, 16, 3, 2, "same", (4, 2), False, radius=1.5, train_terms=3, eval_terms=8)
    assert [name for name, _ in layer.named_parameters()] == ["spatial.free", "pointwise.free"]
    assert "8, 16, kernel_size=3, stride=2, groups=(4, 2), bias=False, paired_shuffle=True" in repr(layer)
    assert "32, kernel_size=3, groups=4, radius=1.5, train_terms=3, eval_terms=8" in repr(layer)
    assert layer.lipschitz_bound() == pytest.approx((1 + gsoft.truncation_error(1.5, 3)) ** 2)
    assert SOCConv2d(8, 16, 5, padding=2).spatial.kernel().shape == (16, 16, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, 32, 3), {}, r"GSConv2d\(3, 32, kernel_size=3, stride=1\): 3 inputs cannot be dealt out in pairs to 4"),
        ((4, 32, 3), {}, "4 inputs cannot be dealt out in pairs to 4 groups"),
        ((6, 32, 3), {"paired_shuffle": False}, "6 inputs cannot be dealt out to 4 groups"),
        ((3, 32, 3, 2), {}, "12 inputs after space-to-depth cannot be dealt out in pairs to 4 groups"),
        ((16, 18, 3), {}, "18 outputs cannot be taken evenly from 4 groups"),
        ((16, 7, 3), {"groups": (4, 2)}, "7 outputs cannot be taken evenly from 2 groups"),
        ((16, 24, 3), {"groups": (4, 5)}, "24 channels cannot be dealt out in pairs to 5 groups"),
        ((16, 16, 3), {"groups": (0, None)}, "channels, stride and groups must be 1 or more"),
        ((16, 16, 3), {"groups": 4}, r"groups is 4, but must be a pair \(a, b\) or \(a, None\); with \(4, None\)"),
        ((16, 16, 3), {"groups": (4,)}, r"groups is \(4,\), but must be a pair"),
        ((16, 16, 3), {"groups": (4, "2")}, "but must be a pair"),
        ((16, 16, 3), {"groups": (None, 2)}, "but must be a pair"),
        ((4, 4, 1), {"paired_shuffle": False}, "a 1×1 kernel has nothing to learn in groups of one channel"),
        ((4, 4, 3), {"groups": (2, 4), "paired_shuffle": False}, "has nothing to learn in groups of one channel"),
        ((1, 1, 1), {"groups": (1, None)}, "has nothing to learn in groups of one channel"),
        ((16, 16, (3, 3)), {}, "kernel_size and stride must be one number each"),
        ((16, 16, 4), {}, "kernel_size must be odd"),
        ((16, 16, 3), {"padding": 0}, "padding is 0; valid: 'same', which is 1"),
        ((16, 16, 3), {"radius": 4.0}, "radius is 4.0; valid: above 0, up to π"),
        ((16, 16, 3), {"train_terms": 0}, "terms is 0; valid: 1 or more"),
    ],
)
def test_what_cannot_be_a_layer(arguments, options, message):
    with pytest.raises(GSOFTError, match=message):
        GSConv2d(*arguments, **options)


def test_pictures_with_other_channels():
    with pytest.raises(GSOFTError, match="pictures have 3 channels, and the layer takes 16"):
        make("equal")(torch.zeros(2, 3, SIDE, SIDE))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        SOCConv2d(3, 16, 3),
        MaxMin(),
        nn.Sequential(GSConv2d(16, 16, 3, groups=(4, 2)), MaxMin()),
        GSConv2d(16, 32, 3, 2),
        GSConv2d(32, 64, 1, 2),
        SOCConv2d(64, 10, 1, bias=False),
        nn.Flatten(),
    )


class TestPlainCopy:
    def test_computes_the_same(self):
        network, x = model(), torch.randn(5, 3, 4, 4)
        plain = plain_copy(network)
        assert network.training
        assert not plain.training
        torch.testing.assert_close(plain(x), network.eval()(x))
        torch.testing.assert_close(plain_copy(network[0])(x), network[0](x))

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
    def test_keeps_the_dtype(self, dtype, tolerance):
        network, x = model().to(dtype).eval(), torch.randn(5, 3, 4, 4, dtype=dtype)
        torch.testing.assert_close(plain_copy(network)(x), network(x), atol=tolerance, rtol=0)

    def test_has_nothing_to_learn_or_to_make(self):
        plain = plain_copy(model())
        assert not any(parameter.requires_grad for parameter in plain.parameters())
        assert not any(isinstance(module, GSConv2d) for module in plain.modules())
        assert not any("free" in name for name in plain.state_dict())

    def test_pointwise_layers_are_single_convolutions(self):
        plain = plain_copy(model())
        assert type(plain[4]) is nn.Conv2d
        assert (plain[4].kernel_size, plain[4].stride) == ((2, 2), (2, 2))
        assert type(plain[5]) is nn.Conv2d
        assert plain[5].bias is None

    def test_the_model_can_be_trained_on(self):
        network, x = model(), torch.randn(5, 3, 4, 4)
        plain = plain_copy(network)
        before = plain(x)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1)
        assert torch.equal(plain(x), before)

    @pytest.mark.slow
    def test_an_exported_program_runs_where_there_is_no_gsoft(self, tmp_path):
        network, x = model(), torch.randn(5, 3, 4, 4)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(plain_copy(network), (x,), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "network.pt2")
        torch.save((x[:3], network.eval()(x[:3]).detach()), tmp_path / "expected.pt")
        code = (
            "import sys, torch; sys.modules['gsoft'] = None; x, y = torch.load('expected.pt'); "
            "torch.testing.assert_close(torch.export.load('network.pt2').module()(x), y)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
