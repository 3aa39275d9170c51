"""Several adapters on one base model, at any strength."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import randomise, run, tiny_text_encoder, tiny_unet
from torch import Tensor, nn

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.adapters.file import save_adapter
from gsoft_diffusion.adapters.identity import fingerprint
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.foundation.errors import UserError

CONFIGS = {
    "dog": AdapterConfig(nblocks=4),
    "oil": AdapterConfig(nblocks=2, parametrization="exp", double=False, text_encoder=False),
}


def write_adapter(path: Path, config: AdapterConfig, seed: int, base_seed: int = 0) -> Path:
    unet, text_encoder = tiny_unet(base_seed), tiny_text_encoder(base_seed)
    base = BaseModelIdentity("tiny", fingerprint(unet, [text_encoder]))
    adapter = inject(config, unet, [text_encoder])
    randomise(adapter, seed)
    save_adapter(path, adapter, base_model=base, training={}, prompts={"unique_token": path.stem})
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(folder / f"{name}.safetensors", config, seed)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture
def model() -> tuple[nn.Module, nn.Module]:
    return tiny_unet(), tiny_text_encoder()


@pytest.fixture
def stack(model, paths) -> AdapterStack:
    stack = AdapterStack(model[0], [model[1]])
    for name, path in paths.items():
        stack.load(name, path)
    return stack


def weights(model: tuple[nn.Module, ...]) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": tensor.clone()
        for number, model in enumerate(model)
        for name, tensor in model.state_dict().items()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def merged(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = tiny_unet().to(dtype), tiny_text_encoder().to(dtype)
    load_adapter(path, model[0], [model[1]])[0].merge()
    return weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_at_full_strength_is_merging_bit_for_bit(paths, name, dtype):
    model = tiny_unet().to(dtype), tiny_text_encoder().to(dtype)
    stack = AdapterStack(model[0], [model[1]])
    stack.load(name, paths[name])
    stack.use({name: 1.0})
    assert same(weights(model), merged(paths[name], dtype))


def test_without_strength_the_base_model_stays_bit_for_bit(stack, model):
    before = weights(model)
    stack.use({"dog": 0.0, "oil": 0.0})
    assert same(weights(model), before)


def test_switching_and_back_is_exact(stack, model):
    base = weights(model)
    stack.use({"dog": 1.0})
    dog = weights(model)
    stack.use({"oil": 0.7, "dog": 0.5})
    both = weights(model)
    assert not same(dog, both)
    stack.use({"dog": 1.0})
    assert same(weights(model), dog)
    with stack.disabled():
        assert same(weights(model), base)
        assert stack.strengths == {}
    assert same(weights(model), dog)
    assert stack.strengths == {"dog": 1.0}
    stack.use({})
    assert same(weights(model), base)


def test_adapters_act_one_after_the_other(stack, paths):
    """The same as training's processors, put on a model into which the first adapter has been merged."""
    stack.use({"dog": 1.0, "oil": 1.0})
    (unet, (text_encoder,)) = stack._models
    together = run(unet, text_encoder)
    first = tiny_unet(), tiny_text_encoder()
    load_adapter(paths["dog"], first[0], [first[1]])[0].merge()
    plain = tiny_unet(), tiny_text_encoder()
    for model, source in zip(plain, first, strict=True):
        model.load_state_dict(source.state_dict())
    second = inject(CONFIGS["oil"], plain[0], [plain[1]])
    other = tiny_unet(), tiny_text_encoder()
    second.load_state_dict(load_adapter(paths["oil"], other[0], [other[1]])[0].state_dict())
    torch.testing.assert_close(together, run(*plain), rtol=1e-4, atol=1e-5)
    stack.use({"oil": 1.0, "dog": 1.0})
    assert (run(unet, text_encoder) - together).abs().max() > 1e-3  # the order counts


@pytest.mark.parametrize("strength", [-1.0, 0.3, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_strength_is_a_rotation(tmp_path, config, strength):
    """All singular values of the weights stay, whatever the strength and whatever comes after, without scales."""
    config = AdapterConfig(**(config.to_dict() | {"output_scale": False}))
    model = tiny_unet(), tiny_text_encoder()
    stack = AdapterStack(model[0], [model[1]])
    stack.load("first", write_adapter(tmp_path / "first.safetensors", config, 1))
    stack.load("second", write_adapter(tmp_path / "second.safetensors", config, 2))
    changed = 0
    for _, weight, composed in stack.composed({"first": strength, "second": 0.4}):
        torch.testing.assert_close(torch.linalg.svdvals(composed), torch.linalg.svdvals(weight), rtol=1e-4, atol=1e-5)
        changed += (composed - weight).abs().max() > 1e-2
    assert changed > 10


def test_an_adapter_can_be_loaded_at_a_strength(paths, stack, model):
    """With its processors, as training has it."""
    stack.use({"dog": 0.4})
    others = tiny_unet(), tiny_text_encoder()
    adapter, _ = load_adapter(paths["dog"], others[0], [others[1]], strength=0.4)
    assert adapter.orthogonality_error() < 1e-5
    torch.testing.assert_close(run(*others), run(*model), rtol=1e-4, atol=1e-5)


def test_a_strength_that_is_no_number_leaves_the_models_as_they_were(paths):
    unet = tiny_unet()
    with pytest.raises(UserError, match=r"its strength nan is not a number"):
        load_adapter(paths["dog"], unet, [tiny_text_encoder()], strength=float("nan"))
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_what_cannot_be_used(stack, paths, model, tmp_path):
    stack.use({"dog": 1.0})
    before = weights(model)
    with pytest.raises(UserError, match=r"cat: no adapter of this name is loaded; there are dog, oil"):
        stack.use({"oil": 1.0, "cat": 1.0})
    with pytest.raises(UserError, match=r"dog: its strength nan is not a number"):
        stack.use({"dog": float("nan")})
    with pytest.raises(UserError, match=r"dog: an adapter of this name is loaded already"):
        stack.load("dog", paths["oil"])
    other = write_adapter(tmp_path / "other.safetensors", CONFIGS["dog"], 1, base_seed=5)
    with pytest.raises(UserError, match=r"other\.safetensors: trained on the base model tiny, .* other weights"):
        stack.load("other", other)
    assert same(weights(model), before)
    assert stack.strengths == {"dog": 1.0}
