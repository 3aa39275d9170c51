from __future__ import annotations

import copy

import pytest
import torch
from plain_models import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gsoft import Adapter, GSOFTError, RotationConfig
from gsoft import adapter as adapter_module
from gsoft.fused import RotatedSlices
from gsoft.linear import RotatedLayer, RotatedLinear
from gsoft.linear_slice import LinearSlice, whole_of
from gsoft.rotation import Rotation

CONFIG = RotationConfig(nblocks=4)
TOKENS = [3, 3000]  # few enough for rotated activations on a CPU, and too many for it


class Block(nn.Module):
    """As FLUX.2's single-stream blocks: query, key, value and more in one matrix, then one for two kinds of inputs."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward = nn.Linear(16, 3 * 24 + 40, bias=bias, dtype=dtype)
        self.outward = nn.Linear(24 + 40, 16, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, rest = self.inward(x).split([24, 24, 24, 40], dim=-1)
        return self.outward(torch.cat([query * key.tanh() + value, rest], dim=-1))


class Separate(nn.Module):
    """The same with a layer for each slice."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        sizes = [24, 24, 24, 40]
        biases = [None] * 4 if block.inward.bias is None else block.inward.bias.split(sizes)
        rows = zip(block.inward.weight.split(sizes), biases, strict=True)
        self.query, self.key, self.value, self.rest = (self.layer(*row) for row in rows)
        columns = block.outward.weight.split([24, 40], dim=1)
        self.attention, self.other = self.layer(columns[0], None), self.layer(columns[1], block.outward.bias)

    @staticmethod
    def layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.query(x) * self.key(x).tanh() + self.value(x)) + self.other(self.rest(x))


NAMES = ("query", "key", "value", "attention")


def slices(block: Block) -> dict[str, LinearSlice]:
    rows = {f"model.{name}": LinearSlice(block.inward, 0, 24 * i, 24) for i, name in enumerate(NAMES[:3])}
    return rows | {"model.attention": LinearSlice(block.outward, 1, 0, 24)}


def adapted(block: Block, trained: bool = True) -> Adapter:
    adapter = Adapter(CONFIG, slices(block), [block])
    if trained:
        randomise(adapter)
    adapter.attach()
    return adapter


def both(trained: bool = True, **options: object) -> tuple[Block, Adapter, Separate, Adapter]:
    """A block of which slices are rotated, and one whose layers are, by the same rotations."""
    block = Block(**options)
    separate = Separate(block)
    adapter = adapted(block, trained)
    linears = {f"model.{name}": getattr(separate, name) for name in NAMES}
    other = Adapter(CONFIG, linears, [separate])
    other.load_state_dict(adapter.state_dict())
    other.attach()
    return block, adapter, separate, other


@pytest.fixture(params=[True, False], ids=["room", "no room"])
def room(request, monkeypatch):
    """With room for rotated weights, and without, where activations are rotated."""
    if not request.param:
        monkeypatch.setattr(adapter_module, "KEPT_WEIGHT_BYTES", 0)
    return request.param


def gradients(adapter: Adapter, output: Tensor) -> dict[str, Tensor]:
    output.square().mean().backward()
    found = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    adapter.zero_grad()
    return found


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_slice_is_a_layer_of_its_own(room, tokens, bias):
    """Outputs, and gradients by x and by all that is learned, are those of separate layers."""
    block, adapter, separate, other = both(bias=bias)
    x = torch.randn(2, tokens, 16)
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = block(ours), separate(reference)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    found, wanted = gradients(adapter, output), gradients(other, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.grad, reference.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_at_the_start_outputs_are_the_plain_layers_to_the_bit(room, tokens, dtype):
    """Also in training, and something is learned from the first step on."""
    block = Block(dtype=dtype)
    x = torch.randn(tokens, 16).to(dtype)
    with torch.no_grad():
        before = block(x)
    adapter = adapted(block, trained=False)
    with torch.no_grad():
        assert torch.equal(block(x), before)
    output = block(x)
    assert torch.equal(output, before)
    output.float().square().mean().backward()
    assert not adapter.without_gradient()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merged_and_unmerged_agree_to_the_bit(dtype):
    block = Block(dtype=dtype)
    weights, x = copy.deepcopy(block.state_dict()), torch.randn(5, 16).to(dtype)
    adapter = adapted(block)
    unmerged = block(x)
    adapter.merge()
    assert torch.equal(block(x), unmerged)
    rest = block.inward.weight[72:], block.outward.weight[:, 24:]
    assert torch.equal(rest[0], weights["inward.weight"][72:])
    assert torch.equal(rest[1], weights["outward.weight"][:, 24:])
    assert not torch.equal(block.inward.weight[:24], weights["inward.weight"][:24])
    adapter.remove()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in block.state_dict().items())
    assert type(block.inward) is type(block.outward) is nn.Linear


@torch.no_grad()
def test_single_slices_may_be_merged():
    block = Block()
    adapter, x = adapted(block), torch.randn(5, 16)
    expected = block(x)
    for name, linear, rotated in adapter.layers():
        rotated.merge(linear)
        torch.testing.assert_close(block(x), expected, msg=name)
    for _, linear, rotated in adapter.layers():
        rotated.unmerge(linear)
    assert torch.equal(block(x), expected)


def test_slices_of_which_only_some_have_room(monkeypatch):
    block, adapter, separate, other = both()
    adapter.remove()
    monkeypatch.setattr(adapter_module, "KEPT_WEIGHT_BYTES", 2 * 4 * 24 * 16)
    adapter.attach()
    x = torch.randn(3000, 16)
    output, expected = block(x), separate(x)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    found, wanted = gradients(adapter, output), gradients(other, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_autocast():
    block, adapter, separate, other = both()
    x = torch.randn(3000, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = block(x), separate(x)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0.1)
    found, wanted = gradients(adapter, output.float()), gradients(other, expected.float())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=0.02, rtol=0.1)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_bias_that_is_thawed_learns(room, tokens):
    block, adapter, *_ = both()
    block.inward.bias.requires_grad_(True)
    output = block.inward(torch.randn(tokens, 16))
    output.square().sum().backward()
    expected = 2 * output.detach().sum(0)
    torch.testing.assert_close(block.inward.bias.grad, expected, rtol=1e-4, atol=1e-3)
    assert all(parameter.grad is not None for name, parameter in adapter.named_parameters() if "attention" not in name)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
def test_what_slices_return_may_be_changed_in_place(room, trained, shape):
    found = []
    for in_place in (False, True):
        block, x = Block(), torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        adapter = adapted(block, trained)
        relu = nn.ReLU(inplace=in_place)
        y = block.outward(relu(block.inward(x))[..., 48:])
        if in_place:
            y += x
        else:
            y = y + x
        found.append([y.detach(), *gradients(adapter, y).values(), x.grad])
    for ours, reference in zip(*found, strict=True):
        assert torch.equal(ours, reference)


def test_of_the_matrix_that_is_put_together_nothing_is_kept_for_the_backward_pass():
    block = Block()
    adapted(block)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        block.inward(torch.randn(3000, 16))
        block.outward(torch.randn(3000, 64))
    assert {block.inward.weight.shape, block.outward.weight.shape}.isdisjoint(kept)
    assert torch.Size([24, 16]) in kept
    assert torch.Size([3000, 64]) not in kept  # of the inputs, those of the columns that learn
    assert torch.Size([3000, 24]) in kept


def test_gradient_checkpointing(room):
    block, adapter, *_ = both()
    x = torch.randn(3000, 16)
    wanted = gradients(adapter, block(x))
    found = gradients(adapter, checkpoint(block, x, use_reentrant=False))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


def test_it_is_one_graph_for_the_compiler(room):
    torch._dynamo.reset()
    block, adapter, *_ = both()
    x = torch.randn(3000, 16)
    expected = block(x)
    wanted = gradients(adapter, expected)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    output = compiled(x)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(adapter, output).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_copies_of_the_model_are_rotated_as_well():
    block = Block()
    adapter, x = adapted(block), torch.randn(5, 16)
    expected = block(x)
    copied = copy.deepcopy(block)
    adapter.remove()
    assert torch.equal(copied(x), expected)
    copied.inward.weight.zero_()
    assert not torch.allclose(copied(x), expected)


@torch.no_grad()
def test_disabled_and_moved_to_another_dtype():
    block = Block()
    x = torch.randn(5, 16)
    before = block(x)
    adapter = adapted(block)
    with adapter.disabled():
        assert torch.equal(block(x), before)
    block.to(torch.float64)
    assert block(x.double()).dtype == torch.float64


def test_what_a_slice_has_is_a_view():
    block = Block()
    one = LinearSlice(block.inward, 0, 24, 48)
    assert (one.in_features, one.out_features, tuple(one.weight.shape)) == (16, 48, (48, 16))
    assert torch.equal(one.bias, block.inward.bias[24:72])
    with torch.no_grad():
        one.weight.zero_()
    assert not block.inward.weight[24:72].any()
    assert block.inward.weight[72:].any()
    columns = LinearSlice(block.outward, 1, 24, 40)
    assert (columns.in_features, columns.out_features, columns.bias) == (40, 16, None)
    x = torch.randn(3, 40)
    assert torch.equal(columns(x), F.linear(x, block.outward.weight[:, 24:]))
    assert whole_of(columns) is whole_of(block.outward) is block.outward


@pytest.mark.parametrize(("dim", "start", "length"), [(0, 100, 24), (0, -1, 2), (1, 0, 17), (1, 4, 0)])
def test_there_is_no_such_slice(dim, start, length):
    with pytest.raises(ValueError, match="there is no such slice"):
        LinearSlice(Block().inward, dim, start, length)


def test_slices_that_cannot_be_computed_together():
    block = Block()

    def rotated(one: LinearSlice) -> tuple[LinearSlice, RotatedLayer]:
        return one, RotatedLayer(Rotation(CONFIG, one.in_features, one.out_features))

    rows, more, columns = LinearSlice(block.inward, 0, 0, 24), LinearSlice(block.inward, 0, 20, 24), slices(block)
    with pytest.raises(ValueError, match="overlap"):
        RotatedSlices([rotated(rows), rotated(more)])
    with pytest.raises(ValueError, match="rows and columns"):
        RotatedSlices([rotated(rows), rotated(columns["model.attention"])])


def test_the_rest_may_be_anywhere():
    block = Block()
    x = torch.randn(3000, 16)
    one = LinearSlice(block.inward, 0, 24, 24)
    adapter = Adapter(CONFIG, {"model.key": one}, [block])
    randomise(adapter)
    adapter.attach()
    assert isinstance(block.inward, RotatedLinear)
    rotated = adapter.rotated("model.key").rotated_weight(one.weight)
    expected = F.linear(x, torch.cat([block.inward.weight[:24], rotated, block.inward.weight[48:]]), block.inward.bias)
    assert torch.equal(block.inward(x), expected)
    torch.testing.assert_close(block.inward(x[:2]), expected[:2], atol=1e-5, rtol=1e-5)


def test_models_on_another_device_are_named():
    block = Block()
    adapted(block)
    block.to("meta")
    with pytest.raises(GSOFTError, match=r"model\.query: the adapter is on cpu, the model on meta"):
        block.inward(torch.randn(3, 16, device="meta"))
