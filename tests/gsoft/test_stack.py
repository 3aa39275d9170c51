"""Several adapters on one plain model; see also tests/adapters/test_stack.py."""

from __future__ import annotations

import pytest
import torch
from plain_models import inputs, mlp, randomise

import gsoft
from benchmarks.pretended_gpu import PretendedGPU
from gsoft import AdapterStack, Config, GSOFTError

CONFIGS = {
    "a": Config(target_modules=["0", "2"], block_size=3, nfactors="dense"),
    "b": Config(target_modules=["2", "4"], nblocks=1, double=False),
}


@pytest.fixture
def paths(tmp_path):
    made = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        adapter = gsoft.inject(mlp(), config)
        randomise(adapter, seed)
        made[name] = tmp_path / f"{name}.safetensors"
        gsoft.save(adapter, made[name])
    return made


@torch.no_grad()
def test_one_after_the_other(paths):
    """The layer that both are on is rotated by the first, then by the second; switched off, all is to the bit."""
    model, base = mlp(), mlp()
    stack = AdapterStack(model)
    for name, path in paths.items():
        stack.load(name, path)
    stack.use({"a": 1.0, "b": 1.0})
    expected = base[2].weight
    for path in paths.values():
        expected = gsoft.load(path, mlp()).rotated("model.2").rotated_weight(expected)
    torch.testing.assert_close(model[2].weight, expected)
    stack.use({"b": 1.0, "a": 1.0})
    assert not torch.allclose(model[2].weight, expected)
    stack.use({"a": 0.5})
    weaker = mlp()
    gsoft.load(paths["a"], weaker, strength=0.5)
    torch.testing.assert_close(model(inputs(5, 12)), weaker(inputs(5, 12)))
    with stack.disabled():
        assert torch.equal(model(inputs(5, 12)), base(inputs(5, 12)))
    stack.use({})
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_used(paths, tmp_path):
    stack = AdapterStack(mlp())
    stack.load("a", paths["a"])
    with pytest.raises(GSOFTError, match="c: no adapter of this name is loaded; there are a"):
        stack.use({"c": 1.0})
    with pytest.raises(GSOFTError, match="a: its strength inf is not a number"):
        stack.use({"a": float("inf")})
    with pytest.raises(GSOFTError, match="a: an adapter of this name is loaded already"):
        stack.load("a", paths["b"])
    adapter = gsoft.inject(mlp(), Config(target_modules=["0"], block_size=6, modules_to_save=["4"]))
    gsoft.save(adapter, tmp_path / "head.safetensors")
    with pytest.raises(
        GSOFTError, match=r"head\.safetensors: trains whole modules \(4\), which a stack cannot compose"
    ):
        stack.load("head", tmp_path / "head.safetensors")


@torch.no_grad()
def test_a_model_may_be_moved_after_its_adapters_were_read(paths):
    model, on_cpu = mlp(), mlp()
    for one in (model, on_cpu):
        stack = AdapterStack(one)
        stack.load("a", paths["a"])
        with PretendedGPU():
            if one is model:
                model.to("cuda")
            stack.use({"a": 1.0})
    assert model[0].weight.device.type == "cuda"
    torch.testing.assert_close(model[0].weight.cpu(), on_cpu[0].weight)
