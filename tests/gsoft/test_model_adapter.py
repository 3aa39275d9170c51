"""An adapter on any model: what its layers compute, training, merging, switching off, removing, copying."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import warnings
import weakref

import pytest
import torch
from plain_models import Recurrent, TiedModel, encoder_layer, inputs, mlp, randomise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gsoft
from gsoft import Config, GSOFTError
from gsoft.group_and_shuffle import dense_reference
from gsoft.linear import RotatedLayer, RotatedLinear
from gsoft.products import RotationBlocks

CONFIGS = {
    "double": Config(block_size=3, nfactors="dense"),
    "one-sided": Config(nblocks=3, nfactors="dense", double=False, output_scale=False),
    "exponential": Config(block_size=3, nfactors="dense", parametrization="exp"),
}
MODELS = {
    "mlp": (mlp, inputs(5, 12)),
    "transformer": (encoder_layer, inputs(2, 7, 24)),
    "called twice": (Recurrent, inputs(5, 12)),
    "tied": (TiedModel, torch.arange(12).reshape(2, 6)),
}


def dense(layer: nn.Linear, rotated: RotatedLayer) -> torch.Tensor:
    """`W'` of a layer, multiplied out from the paper's definitions."""
    q_in, q_out, scale = rotated.blocks()
    weight = layer.weight.double() @ dense_reference(q_in.double())
    weight = weight if q_out is None else dense_reference(q_out.double()) @ weight
    return weight if scale is None else scale[:, None] * weight


@pytest.fixture(params=MODELS)
def case(request):
    """A model, and what it is given."""
    make, x = MODELS[request.param]
    return make, x


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_starts_bit_equal_and_then_computes_the_definition(case, config, training):
    """In train and eval mode, with and without gradients, against a plain model with the dense rotated weights."""
    make, x = case
    model, plain = make().train(training).requires_grad_(False), make().train(training).requires_grad_(False)
    before = model(x)
    adapter = gsoft.inject(model, config)
    if make is encoder_layer and not training:  # its fused path, which rounds differently, is not taken any more
        torch.testing.assert_close(model(x), before)
    else:
        assert torch.equal(model(x), before)
    randomise(adapter)
    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer, rotated in adapter.layers():
            layers[name.removeprefix("model.")].weight.copy_(dense(layer, rotated))
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-4)
    assert (model(x) - before).abs().max() > 1e-3
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_the_dense_reference(case, training):
    make, x = case
    model = make().train(training)
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    model(x).square().mean().backward()
    plain = make().train(training)
    layers = dict(plain.named_modules())
    weights = {name: dense(layer, rotated) for name, layer, rotated in adapter.layers()}
    replaced = {f"{name.removeprefix('model.')}.weight": weight.float() for name, weight in weights.items()}
    assert all(name.rpartition(".")[0] in layers for name in replaced)
    loss = torch.func.functional_call(plain, replaced, (x,)).square().mean()
    parameters = dict(adapter.named_parameters())
    for (name, parameter), expected in zip(
        parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-3)


def test_training_lowers_a_loss_and_leaves_the_base_alone():
    model, x = mlp(), inputs(32, 12)
    before = copy.deepcopy(model.state_dict())
    target = inputs(32, 3)
    adapter = gsoft.inject(model, CONFIGS["double"])
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert adapter.orthogonality_error() < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_singular_values_are_kept_without_a_scale():
    model = mlp()
    adapter = gsoft.inject(model, Config(block_size=3, nfactors="dense", output_scale=False))
    randomise(adapter)
    before = {name: layer.weight.clone() for name, layer, _ in adapter.layers()}
    adapter.merge()
    for name, layer, _ in adapter.layers():
        assert (layer.weight - before[name]).abs().max() > 0.05
        torch.testing.assert_close(
            torch.linalg.svdvals(layer.weight), torch.linalg.svdvals(before[name]), atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_merging_disabling_and_removing(case):
    make, x = case
    model = make().eval()
    names, states = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = model(x)
    adapter = gsoft.inject(model, CONFIGS["double"])
    assert dict(model.named_modules()) == names
    assert model.state_dict().keys() == states.keys()
    randomise(adapter)
    trained = model(x)
    assert not torch.equal(trained, before)
    for merged in (False, True):
        if merged:
            adapter.merge()
            adapter.merge()  # a second time changes nothing
        torch.testing.assert_close(model(x), trained)
        with adapter.disabled():
            torch.testing.assert_close(model(x), before)
            assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
        assert adapter.merged == merged
        torch.testing.assert_close(model(x), trained)
    plain = make().eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), trained)
    adapter.remove()
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    assert not any(isinstance(module, RotatedLinear) for module in model.modules())
    gsoft.inject(model, CONFIGS["double"])  # and it can be adapted again


def test_a_layer_in_two_places_is_one_layer():
    model = Recurrent()
    adapter = gsoft.inject(model, CONFIGS["double"])
    assert [name for name, _, _ in adapter.layers()] == ["model.first", "model.out"]
    assert model.first is model.again
    for targets in (["again"], "again", ["first"]):
        adapter.remove()
        adapter = gsoft.inject(model, Config(target_modules=targets, block_size=3, nfactors="dense"))
        assert [name for name, _, _ in adapter.layers()] == ["model.first"]


@pytest.mark.parametrize("grad", [False, True])
def test_a_transformers_fast_path_is_not_taken(grad):
    """In eval mode PyTorch's encoder layer reads the weights itself, which would leave out what was learned."""
    model, x = encoder_layer().eval().requires_grad_(False), inputs(2, 7, 24)
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    with torch.set_grad_enabled(grad):
        y = model(x)
    assert y.requires_grad == grad
    assert not torch.allclose(y, encoder_layer().eval()(x))
    adapter.remove()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("grad", [False, True])
def test_a_padded_batch_through_a_whole_encoder(grad):
    """In eval mode an encoder would make a nested tensor of it, which has gradients on the layers' fast path alone."""
    encoder, x = nn.TransformerEncoder(encoder_layer(), 2).eval(), inputs(2, 7, 24)
    other = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    model = nn.ModuleList([encoder, other])
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    with torch.set_grad_enabled(grad):
        ours = encoder(x, src_key_padding_mask=padding)
    assert ours.requires_grad == grad
    copied_model, copied_adapter = copy.deepcopy(nn.ModuleList([model, adapter]))
    with torch.no_grad():
        adapter.merge()
        merged = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], merged[~padding])
    assert not encoder.use_nested_tensor
    adapter.remove()
    assert (encoder.use_nested_tensor, other.use_nested_tensor) == (True, False)
    assert not copied_model[0].use_nested_tensor
    copied_adapter.remove()
    assert copied_model[0].use_nested_tensor


def test_an_encoder_without_adapted_layers_keeps_its_nested_tensors():
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(encoder_layer(), 1), "head": nn.Linear(24, 24)})
    gsoft.inject(model, Config(target_modules=["head"], block_size=6))
    assert model["encoder"].use_nested_tensor


def test_copies_are_independent(case):
    make, x = case
    model = make().eval()
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    with torch.no_grad():
        before = model(x)
        copied_model, copied_adapter = copy.deepcopy(nn.ModuleList([model, adapter]))
        randomise(copied_adapter, seed=1)
        assert torch.equal(model(x), before)
        assert not torch.equal(copied_model(x), before)
        copied_adapter.remove()
        torch.testing.assert_close(copied_model(x), make().eval()(x))
        assert torch.equal(model(x), before)


def test_removing_twice_leaves_the_next_adapter_alone():
    model = mlp()
    first = gsoft.inject(model, CONFIGS["double"])
    first.remove()
    second = gsoft.inject(model, CONFIGS["double"])
    randomise(second)
    rotated = model(inputs(5, 12))
    first.remove()
    assert torch.equal(model(inputs(5, 12)), rotated)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    second.remove()
    assert torch.equal(model(inputs(5, 12)), mlp()(inputs(5, 12)))


@torch.no_grad()
def test_merged_for_good_the_model_is_an_ordinary_one(case):
    make, x = case
    model = make().eval()
    types = [type(module) for module in model.modules()]
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    rotated, learned = model(x), copy.deepcopy(adapter.state_dict())
    adapter.merge_and_unload()
    torch.testing.assert_close(model(x), rotated)
    assert [type(module) for module in model.modules()] == types
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    merged = model(x)
    adapter.remove()  # too late
    assert torch.equal(model(x), merged)
    assert all(torch.equal(tensor, learned[name]) for name, tensor in adapter.state_dict().items())
    gsoft.inject(model, CONFIGS["double"])  # the next one


def test_a_merge_without_a_model_is_refused():
    model = mlp()
    adapter = gsoft.ModelAdapter(CONFIGS["double"], model)
    with pytest.raises(GSOFTError, match=r"merge\(\): the adapter is not on its models"):
        adapter.merge()
    adapter.attach()
    with pytest.raises(GSOFTError, match="is on its models already"):
        adapter.attach()
    randomise(adapter)
    adapter.remove()
    with pytest.raises(GSOFTError, match="is not on its models"):
        adapter.merge()
    assert torch.equal(model(inputs(5, 12)), mlp()(inputs(5, 12)))
    adapter.attach()
    adapter.merge_and_unload()
    merged = model(inputs(5, 12))
    with pytest.raises(GSOFTError, match="is not on its models"):
        adapter.merge()
    with pytest.raises(GSOFTError, match="left no base model"), adapter.disabled():
        pass
    assert torch.equal(model(inputs(5, 12)), merged)


def test_a_merge_that_fails_changes_nothing():
    model = mlp()
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    model[4].to("meta")
    for merge in (adapter.merge, adapter.merge_and_unload):
        with pytest.raises(GSOFTError, match=r"model\.4: the adapter is on cpu, the model on meta"):
            merge()
        assert not adapter.merged
        assert torch.equal(model[0].weight, mlp()[0].weight)
    assert isinstance(model[0], RotatedLinear)


class TestTwoAdaptersOnAModel:
    """Each would freeze what the other trains, and thaw what the other has frozen."""

    FIRST, SECOND = (Config(target_modules=[name], block_size=6, modules_to_save=["4"]) for name in "02")

    def test_the_second_is_refused(self):
        model = mlp()
        first = gsoft.inject(model, self.FIRST)
        learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for place in (model, nn.Sequential(model)):
            with pytest.raises(GSOFTError, match="carries a GSOFT adapter already: remove it first"):
                gsoft.inject(place, Config(target_modules=["2"], block_size=6))
            assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learns
        first.remove()
        gsoft.inject(model, self.SECOND).merge_and_unload()
        gsoft.inject(model, self.FIRST)

    def test_also_on_a_part_of_the_model_and_on_a_copy(self):
        model = nn.ModuleDict({"body": mlp(), "other": mlp()})
        adapter = gsoft.inject(model, Config(target_modules=["body.0"], block_size=6))
        copied, copied_adapter = copy.deepcopy(nn.ModuleList([model, adapter]))
        for each in (model, copied):
            with pytest.raises(GSOFTError, match="carries a GSOFT adapter already"):
                gsoft.inject(each["other"], self.FIRST)
        adapter.remove()
        gsoft.inject(model["other"], self.FIRST)
        with pytest.raises(GSOFTError, match="carries a GSOFT adapter already"):
            gsoft.inject(copied["other"], self.FIRST)
        copied_adapter.remove()
        gsoft.inject(copied["other"], self.FIRST)

    def test_parts_of_a_model_have_their_own(self):
        model = nn.ModuleDict({"body": mlp(), "other": mlp()})
        first, second = gsoft.inject(model["body"], self.FIRST), gsoft.inject(model["other"], self.SECOND)
        first.remove()
        assert not model["other"][0].weight.requires_grad
        assert model["other"][4].weight.requires_grad
        second.remove()
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("how", ["remove", "merge_and_unload"])
@pytest.mark.parametrize("trains", [True, False])
def test_nothing_outlives_a_model_and_its_adapter(how, trains):
    model = mlp()
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    output = model(inputs(5, 12)).sum()
    if trains:
        output.backward()
    made = weakref.ref(next(rotated for _, _, rotated in adapter.layers()).cache), weakref.ref(model[0])
    del output
    getattr(adapter, how)()
    del adapter, model
    gc.collect()
    assert [each() for each in made] == [None, None]


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12)])
@pytest.mark.parametrize("room", [2**30, 0])
def test_a_bias_that_is_thawed_learns_on_either_side(room, shape, monkeypatch):
    monkeypatch.setattr("gsoft.adapter.KEPT_WEIGHT_BYTES", room)
    model, plain = mlp(), mlp()
    adapter = gsoft.inject(model, CONFIGS["double"])
    model[0].bias.requires_grad_(True)
    model[4].bias.requires_grad_(True)
    model(inputs(*shape)).square().sum().backward()
    plain(inputs(*shape)).square().sum().backward()
    for ours, reference in zip((model[0], model[4]), (plain[0], plain[4]), strict=True):
        torch.testing.assert_close(ours.bias.grad, reference.bias.grad, rtol=1e-4, atol=1e-3)
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_modules_that_are_called_like_methods():
    torch.manual_seed(0)
    model = nn.Module()
    model.start, model.type = nn.Linear(12, 2), nn.Linear(12, 12)
    model.forward = lambda x: model._modules["start"](model._modules["type"](x))
    adapter = gsoft.inject(model, Config(target_modules=["type"], block_size=12, modules_to_save=["start"]))
    randomise(adapter)
    assert {name.rpartition(".")[0] for name in adapter.state_dict()} == {"model.type", "modules_to_save.start"}
    trained = model._modules["start"].bias
    with adapter.disabled():
        assert model._modules["start"].bias is not trained
    assert model._modules["start"].bias is trained


def test_numbers_that_are_written_behind_pytorchs_back():
    model, x = mlp(), inputs(5, 12)
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    with torch.no_grad():
        model(x)
        for parameter in adapter.parameters():
            parameter.data.mul_(0.5)  # which counts no new version
        adapter.refresh()
        refreshed = model(x)
        adapter.merge()
        torch.testing.assert_close(refreshed, model(x))
    other = mlp()
    halved = gsoft.inject(other, CONFIGS["double"])
    halved.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(refreshed, other(x))


@pytest.mark.parametrize("tokens", [5, 5000])
def test_second_derivatives_are_refused_and_not_zero(tokens):
    """On the activations' side, where they would be zero; on the weight's, only where they pass through a rotation."""
    model = nn.Sequential(nn.Linear(400, 400), nn.GELU(), nn.Linear(400, 400))
    adapter = gsoft.inject(model, Config(block_size=20))
    randomise(adapter)
    x = torch.randn(tokens, 400, requires_grad=True)
    if tokens == 5000:  # the weight's side: the penalty's gradient passes through a rotation once
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    else:
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(GSOFTError, match="has no second derivatives"):
            slope.square().sum().backward()
    parameters = list(adapter.parameters())
    slopes = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    with pytest.raises(GSOFTError, match="has no second derivatives"):
        sum(slope.sum() for slope in slopes).backward()


class Residual(nn.Module):
    """Changes what its layers return, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
        self.relu, self.in_place = nn.ReLU(inplace=in_place), in_place

    def forward(self, x):
        y = self.first(x)
        if self.in_place:
            y += x
        else:
            y = y + x
        return self.third(self.relu(self.second(self.relu(y))))


@pytest.mark.parametrize("room", [2**30, 0], ids=["weights", "activations"])
@pytest.mark.parametrize("config", [CONFIGS["double"], CONFIGS["one-sided"]], ids=["double", "one-sided"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_what_a_layer_returns_may_be_changed_in_place(room, config, trained, shape, monkeypatch):
    monkeypatch.setattr("gsoft.adapter.KEPT_WEIGHT_BYTES", room)
    found = []
    for in_place in (False, True):
        model, x = Residual(in_place), inputs(*shape).requires_grad_()
        adapter = gsoft.inject(model, config)
        if trained:
            randomise(adapter)
        y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), x.grad, *(parameter.grad for parameter in adapter.parameters())])
    for ours, reference in zip(*found, strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("room", [2**30, 0], ids=["weights", "activations"])
def test_also_in_a_compiled_model(room, monkeypatch):
    monkeypatch.setattr("gsoft.adapter.KEPT_WEIGHT_BYTES", room)
    torch._dynamo.reset()
    model, x = Residual(True), inputs(5, 12)
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    found = []
    for called in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        adapter.zero_grad()
        called(x).square().mean().backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


class Scaled(nn.Linear):
    """A subclass with attributes of its own."""

    gain = 2.0

    @property
    def sides(self) -> int:
        return self.in_features + self.out_features

    def doubled(self, x):
        return self.gain * self(x)


def test_a_subclass_of_linear_keeps_its_methods():
    model = nn.Sequential(Scaled(12, 12))
    adapter = gsoft.inject(model, CONFIGS["double"])
    randomise(adapter)
    x = inputs(5, 12)
    assert model[0].sides == 24
    assert isinstance(model[0], Scaled)
    copied, _ = copy.deepcopy(nn.ModuleList([model, adapter]))
    pickled, _ = pickle.loads(pickle.dumps(nn.ModuleList([model, adapter])))
    for other in (model, copied, pickled):
        torch.testing.assert_close(other[0].doubled(x), 2 * model(x))
    adapter.remove()
    assert type(model[0]) is Scaled


def test_an_adapter_that_is_not_attached_changes_nothing():
    model = mlp()
    adapter = gsoft.ModelAdapter(TestModulesToSave.CONFIG, model)
    adapter.remove()
    with adapter.disabled():
        assert torch.equal(model(inputs(5, 12)), mlp()(inputs(5, 12)))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, x = mlp().to(dtype), inputs(5, 12).to(dtype)
    before = model(x)
    adapter = gsoft.inject(model, CONFIGS["double"])
    assert torch.equal(model(x), before)
    model(x).float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.parameters())


class TestModulesToSave:
    CONFIG = Config(target_modules=["0", "2"], block_size=3, nfactors="dense", modules_to_save=["4"])

    def trained(self):
        model = mlp()
        adapter = gsoft.inject(model, self.CONFIG)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
        for _ in range(3):
            with torch.enable_grad():
                model(inputs(5, 12)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, adapter

    def test_are_trained_in_their_place(self):
        model, adapter = self.trained()
        assert not torch.equal(model[4].weight, mlp()[4].weight)
        assert "modules_to_save.4.weight" in dict(adapter.named_parameters())
        assert adapter.parameter_counts()["modules_to_save"] == 24 * 3 + 3
        assert adapter.targets.skipped == {}
        assert model.state_dict().keys() == mlp().state_dict().keys()

    def test_a_backward_pass_may_go_on_after_a_look_at_the_base_model(self):
        """As a divergence from the base model asks for."""
        (model, adapter), x = self.trained(), inputs(5, 12)
        found = []
        for looks in (False, True):
            y = model(x)
            if looks:
                with adapter.disabled(), torch.no_grad():
                    assert torch.equal(model(x), mlp()(x))
            y.square().sum().backward()
            found.append([parameter.grad for parameter in adapter.parameters()])
            adapter.zero_grad()
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    @torch.no_grad()
    def test_are_those_from_before_in_a_model_that_was_cast_meanwhile(self):
        model, adapter = self.trained()
        model.bfloat16()
        with adapter.disabled():
            assert torch.equal(model(inputs(5, 12).bfloat16()), mlp().bfloat16()(inputs(5, 12).bfloat16()))
        assert not torch.equal(model[4].weight, mlp()[4].weight.bfloat16())

    def test_their_numbers_stay_after_merging_for_good(self):
        model, adapter = self.trained()
        trained = model(inputs(5, 12))
        adapter.merge_and_unload()
        torch.testing.assert_close(model(inputs(5, 12)), trained)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_in_half_precision_they_may_learn_nothing(self):
        with pytest.warns(UserWarning, match=r"modules_to_save: 4\.weight is in half precision"):
            gsoft.inject(mlp().bfloat16(), self.CONFIG)

    @torch.no_grad()
    def test_are_the_untouched_ones_while_disabled_and_after_removing(self):
        model, adapter = self.trained()
        x = inputs(5, 12)
        trained, base = model(x), mlp()(x)
        with adapter.disabled():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), trained)
        adapter.merge()
        torch.testing.assert_close(model(x), trained)
        with adapter.disabled():
            assert torch.equal(model(x), base)
        adapter.remove()
        assert torch.equal(model(x), base)
        assert all(parameter.requires_grad for parameter in model.parameters())


class TestWhatIsSaid:
    def test_what_matched_and_what_was_skipped(self, caplog):
        config = Config(exclude_modules=["linear2"], block_size=3, nfactors="dense")
        with caplog.at_level(logging.INFO, "gsoft"):
            adapter = gsoft.inject(encoder_layer(), config)
        assert "adapted: linear1 (48, 24)" in caplog.text
        assert "skipped: linear2: is in exclude_modules" in caplog.text
        assert "self_attn.out_proj: belongs to an nn.MultiheadAttention, which uses its weight" in caplog.text
        assert list(adapter.targets.layers) == ["linear1"]

    def test_a_q_that_is_not_dense(self):
        with pytest.warns(
            UserWarning, match=r"Q is not dense in 2 of 2 layers.*0\.q_in \(2 factors of 6 blocks of side"
        ):
            adapter = gsoft.inject(mlp(), Config(target_modules=["0", "2"], block_size=2))
        assert len(adapter.not_dense()) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gsoft.inject(mlp(), Config(target_modules=["0", "2"], block_size=6))

    def test_a_name_that_no_layer_has(self):
        with pytest.warns(UserWarning, match="no layer is called q_proj"):
            gsoft.inject(mlp(), Config(target_modules=["0", "q_proj"], block_size=6))

    def test_a_name_of_which_every_layer_is_skipped(self):
        model = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12))
        with pytest.warns(
            UserWarning, match=r"nothing called 1 is adapted: 1 is a LayerNorm of torch: only nn\.Linear"
        ):
            gsoft.inject(model, Config(target_modules=["0", "1"], block_size=6)).remove()
        both = Config(target_modules=["0", "2"], exclude_modules=["2"], block_size=6)
        with pytest.warns(UserWarning, match="nothing called 2 is adapted: 2 is in exclude_modules"):
            gsoft.inject(model, both)

    def test_no_more_than_needed(self):
        """A name with an adapted layer, and whatever an expression or "all-linear" finds."""
        layers = {"0": nn.ModuleDict({"q": nn.Linear(12, 12)}), "1": nn.ModuleDict({"q": nn.Conv2d(12, 12, 1)})}
        for targets in (["q"], ".*q", "all-linear"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                gsoft.inject(nn.ModuleDict(layers), Config(target_modules=targets, block_size=6)).remove()

    def test_a_layer_without_gradient(self, tmp_path):
        model = nn.ModuleDict({"used": nn.Linear(12, 12), "other": nn.Linear(12, 12)})
        adapter = gsoft.inject(model, Config(block_size=6))
        model["used"](inputs(5, 12)).square().sum().backward()
        assert adapter.without_gradient() == ["model.other"]
        torch.optim.Adam(adapter.parameters(), lr=0.1).step()
        with pytest.warns(UserWarning, match=r"1 of 2 layers have learned nothing, model\.other for example"):
            gsoft.save(adapter, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("room", [2**30, 0], ids=["weights", "activations"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_model_without_contents_can_be_called(room, grad, monkeypatch):
    monkeypatch.setattr("gsoft.adapter.KEPT_WEIGHT_BYTES", room)
    with torch.device("meta"):
        model, x = mlp(), torch.randn(5, 12)
    adapter = gsoft.inject(model, CONFIGS["double"])
    with torch.set_grad_enabled(grad):
        y = model(x)
    assert y.is_meta
    assert y.shape == (5, 3)
    if grad:
        y.sum().backward()
        assert all(parameter.grad.is_meta for parameter in adapter.parameters())


def test_a_model_without_contents_can_be_counted():
    with torch.device("meta"):
        model = mlp()
    adapter = gsoft.inject(model, CONFIGS["double"])
    rotations = (3 * 12 + 3 * 24) + (3 * 24 + 3 * 24) + (3 * 24 + 3)  # m·n·(b−1)/2 with b = 3 and m = 3, or m = 1
    scales = 24 + 24 + 3
    assert adapter.parameter_counts() == {
        "rotations": rotations + scales,
        "modules_to_save": 0,
        "total": rotations + scales,
    }


def test_refusals_leave_the_model_as_it_was():
    model = mlp()
    with pytest.raises(GSOFTError, match=r"model\.4\.q_out has width 3, which block_size 6 does not divide.*valid: 3$"):
        gsoft.inject(model, Config(block_size=6))
    assert type(model[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_large_layers_go_without_a_kept_weight_where_there_is_room_for_the_small_ones(monkeypatch):
    """The same outputs and gradients, whatever there is room for."""
    found = []
    for room in (2**30, 4 * (12 * 24 + 24 * 3), 0):  # for all, for the first and the last layer, for none
        monkeypatch.setattr("gsoft.adapter.KEPT_WEIGHT_BYTES", room)
        model = mlp()
        adapter = gsoft.inject(model, Config(block_size=3, nfactors="dense"))
        randomise(adapter)
        y = model(inputs(5, 12))
        y.square().sum().backward()
        on_weights = [isinstance(rotated.prepared, torch.Tensor) for _, _, rotated in adapter.layers()]
        found.append((on_weights, [y.detach(), *(p.grad for p in adapter.parameters())]))
    assert [on_weights for on_weights, _ in found] == [[True] * 3, [True, False, True], [False] * 3]
    for _, values in found[1:]:
        for ours, reference in zip(values, found[0][1], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_without_room_keeps_no_weight(monkeypatch, grad):
    found = []
    for room in (2**30, 0):
        monkeypatch.setattr("gsoft.adapter.KEPT_WEIGHT_BYTES", room)
        model = mlp()
        adapter = gsoft.inject(model, Config(block_size=3, nfactors="dense"))
        plain = mlp()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            assert torch.equal(model(inputs(5, 12)), plain(inputs(5, 12)))
            randomise(adapter)
            y = model(inputs(5, 12))
        assert y.dtype == torch.bfloat16
        kept = {id(rotated.cache): len(rotated.cache._weights) for _, _, rotated in adapter.layers()}
        gradients = []
        if grad:
            y.float().square().sum().backward()
            gradients = [parameter.grad for parameter in adapter.parameters()]
        found.append((sum(kept.values()), [y.detach(), *gradients]))
    assert [count for count, _ in found] == [3, 0]
    for ours, reference in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=0.1, atol=0.05 * float(reference.abs().max()))


def test_a_compiled_model_of_any_kind_is_one_graph(case):
    """Of PyTorch's own classes, the compiler sees the hook that makes the weights: the graph begins behind it."""
    make, x = case
    whole = type(make()).__module__.partition(".")[0] != "torch"
    results = []
    for compiled in (False, True):
        model = make()
        adapter = gsoft.inject(model, Config(block_size=3, nfactors="dense"))
        randomise(adapter)
        counter = CompileCounterWithBackend("aot_eager")
        called = torch.compile(model, backend=counter, fullgraph=whole) if compiled else model
        values = []
        for _ in range(3):
            adapter.zero_grad()
            called(x).square().sum().backward()
            values += [p.grad.clone() for p in adapter.parameters()]
            with torch.no_grad():
                for p in adapter.parameters():
                    p -= 1e-3 * p.grad.sign()
        results.append(values)
        torch._dynamo.reset()
    assert counter.frame_count == 1
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


def test_a_model_is_one_graph_also_after_a_pass_that_rotated_activations():
    torch._dynamo.reset()
    model = Wide()
    adapter = gsoft.inject(model, Config(block_size=20))
    randomise(adapter)
    x = torch.randn(5, 400)
    expected = model(x)  # with so few vectors they are rotated, and not the weight
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
    rotated = adapter.rotated("model.layer")
    assert isinstance(rotated.prepared, RotationBlocks)
    with torch.no_grad():  # sampling costs what the plain model costs
        torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(rotated.prepared, torch.Tensor)
    torch._dynamo.reset()


class Wide(nn.Module):
    """One wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(400, 400)

    def forward(self, x):
        return self.layer(x)
