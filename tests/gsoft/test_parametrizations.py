from __future__ import annotations

import copy

import pytest
import torch
from plain_models import inputs, randomise
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gsoft
from gsoft import GSOFTError, OrthogonalLinear
from gsoft.blocks import orthogonal_blocks
from gsoft.group_and_shuffle import dense_reference

SHAPES = [(12, 12), (12, 24), (24, 12)]


def is_semi_orthogonal(weight: torch.Tensor) -> bool:
    shorter = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    return bool((shorter @ shorter.mT - torch.eye(len(shorter))).abs().max() < 1e-5)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("parametrization", ["cayley", "exp"])
class TestOrthogonal:
    def test_the_weight_stays_orthogonal(self, out, in_, parametrization):
        torch.manual_seed(0)
        layer = nn.Linear(in_, out)
        assert gsoft.orthogonal(layer, "weight", block_size=4, parametrization=parametrization) is layer
        start = layer.weight.detach().clone()
        assert is_semi_orthogonal(start)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        for _ in range(5):
            layer(inputs(7, in_)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert is_semi_orthogonal(layer.weight)
        assert (layer.weight - start).abs().max() > 0.1

    def test_as_orthogonal_in_autocast(self, out, in_, parametrization):
        layer = gsoft.orthogonal(nn.Linear(in_, out), block_size=4, parametrization=parametrization)
        randomise(layer)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs(7, in_)).dtype == torch.bfloat16
            weight = layer.weight
        assert torch.equal(weight, layer.weight)
        assert is_semi_orthogonal(weight)

    def test_an_orthogonal_weight_is_kept_and_another_can_be_assigned(self, out, in_, parametrization):
        torch.manual_seed(0)
        layer, given = nn.Linear(in_, out), nn.init.orthogonal_(torch.empty(out, in_))
        with torch.no_grad():
            layer.weight.copy_(given)
        gsoft.orthogonal(layer, nblocks=3, parametrization=parametrization)
        torch.testing.assert_close(layer.weight, given)
        randomise(layer)
        assert not torch.allclose(layer.weight, given)
        assert is_semi_orthogonal(layer.weight)
        layer.weight = given
        torch.testing.assert_close(layer.weight, given)


def test_what_is_learned_and_saved():
    layer = gsoft.orthogonal(nn.Linear(12, 12), block_size=4)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "bias": (12,),
        "parametrizations.weight.original": (2, 3, 6),
    }
    randomise(layer)
    other = gsoft.orthogonal(nn.Linear(12, 12), block_size=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (nn.Conv2d(4, 4, 3), "weight", r"Conv2d\.weight has the shape \(4, 4, 3, 3\): only a matrix"),
        (nn.Linear(4, 4), "bias", r"Linear\.bias has the shape \(4,\): only a matrix"),
        (nn.Linear(4, 4), "kernel", r"Linear\.kernel is no tensor"),
        (nn.Linear(6, 4), "weight", r"Linear\.weight has width 6, which block_size 4 does not divide.*valid: 2, 3, 6$"),
    ],
)
def test_what_cannot_be_orthogonal(module, name, message):
    with pytest.raises(GSOFTError, match=message):
        gsoft.orthogonal(module, name, block_size=4)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
        return made


@pytest.mark.parametrize(
    "make",
    [
        lambda: OrthogonalLinear(12, block_size=4),
        lambda: OrthogonalLinear(12, block_size=4, parametrization="exp"),
        lambda: gsoft.orthogonal(nn.Linear(12, 12), block_size=4),
    ],
)
def test_a_new_layer_can_be_compiled_as_a_whole(make, monkeypatch):
    """Before any has been called, so that nothing is remembered of its size."""
    monkeypatch.setattr("gsoft.blocks._REMEMBERED", {})
    torch._dynamo.reset()
    layer, x = make(), inputs(5, 12)
    randomise(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


class TestOrthogonalLinear:
    @pytest.mark.parametrize(("out", "in_"), SHAPES)
    @pytest.mark.parametrize("parametrization", ["cayley", "exp"])
    def test_equals_the_dense_reference(self, out, in_, parametrization):
        layer = OrthogonalLinear(in_, out, block_size=4, parametrization=parametrization)
        randomise(layer)
        (blocks,) = orthogonal_blocks([layer.free], 4, parametrization)
        matrix = dense_reference(blocks)[:out, :in_]
        x = inputs(2, 5, in_).requires_grad_()
        y, expected = layer(x), nn.functional.linear(x, matrix, layer.bias)
        torch.testing.assert_close(y, expected)
        leaves = [x, *layer.parameters()]
        ours, theirs = (torch.autograd.grad(z.square().sum(), leaves, retain_graph=True) for z in (y, expected))
        for gradient, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-4)
        assert is_semi_orthogonal(matrix)

    def test_starts_as_the_identity(self):
        x = inputs(5, 12)
        assert torch.equal(OrthogonalLinear(12, block_size=4)(x), x)

    def test_half_precision_and_no_bias(self):
        layer = OrthogonalLinear(12, bias=False, nblocks=3)
        assert layer(inputs(5, 12).bfloat16()).dtype == torch.bfloat16
        assert "nfactors=2, nblocks=3, block_size=4" in repr(layer)
        assert [name for name, _ in layer.named_parameters()] == ["free"]

    def test_the_bound_holds_without_a_matrix_of_the_layers_size(self):
        layer = OrthogonalLinear(64, block_size=4)
        randomise(layer)
        with Largest() as largest:
            bound = layer.lipschitz_bound()
        assert largest.numbers < 64 * 64
        (blocks,) = orthogonal_blocks([layer.free], 4, "cayley")
        norm = float(torch.linalg.matrix_norm(dense_reference(blocks.detach().double()), ord=2))
        assert norm * (1 - 1e-14) <= bound < norm + 1e-6

    def test_a_width_that_does_not_fit(self):
        with pytest.raises(GSOFTError, match=r"OrthogonalLinear has width 12, which block_size 5 does not divide"):
            OrthogonalLinear(12, block_size=5)
