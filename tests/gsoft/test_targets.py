"""Which layers are adapted, as PEFT's users know it, and what is refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from plain_models import TiedModel, encoder_layer, mlp
from torch import nn
from torch.nn.utils import parametrizations
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gsoft
from gsoft import Config, GSOFTError
from gsoft.targets import find_targets


def found(model: nn.Module, **settings: object) -> list[str]:
    return list(find_targets(model, Config(nblocks=1, **settings)).layers)


def blocks() -> nn.Module:
    return nn.ModuleDict(
        {
            "layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(2)]),
            "head": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "conv": nn.Conv2d(4, 4, 1),
        }
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q"]}, ["layers.0.q", "layers.1.q"]),
        ({"target_modules": ("0.q", "head")}, ["layers.0.q", "head"]),
        ({"target_modules": {"v"}}, ["layers.0.v", "layers.1.v"]),
        ({"target_modules": r"layers\.1\..*"}, ["layers.1.q", "layers.1.v"]),
        ({"target_modules": "all-linear"}, ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v", "head"]),
        ({}, ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v", "head"]),
        ({"exclude_modules": ["head", "v"]}, ["layers.0.q", "layers.1.q"]),
        ({"exclude_modules": r"layers\..*"}, ["head"]),
        ({"target_modules": ["q", "v"], "exclude_modules": ["layers.0.q"]}, ["layers.0.v", "layers.1.q", "layers.1.v"]),
        ({"modules_to_save": ["layers"]}, ["head"]),
    ],
)
def test_names_patterns_and_all(settings, expected):
    assert found(blocks(), **settings) == expected


def test_a_name_is_not_a_part_of_a_name():
    model = nn.ModuleDict({"to_q": nn.Linear(4, 4), "q": nn.Linear(4, 4)})
    assert found(model, target_modules=["q"]) == ["q"]


def test_what_is_no_linear_layer_is_skipped_with_the_reason():
    targets = find_targets(blocks(), Config(target_modules=["q", "norm", "conv", "layers"], nblocks=1))
    assert list(targets.layers) == ["layers.0.q", "layers.1.q"]
    assert targets.skipped == {
        "norm": "is a LayerNorm of torch: only nn.Linear is rotated",
        "conv": "is a Conv2d of torch: only nn.Linear is rotated",
    }
    assert targets.unused_names == ("layers",)
    assert targets.skipped_names == {"norm": "norm", "conv": "conv"}


def test_a_name_is_skipped_if_all_of_its_layers_are():
    settings = {"target_modules": ["q", "v", "1.q", "head"], "exclude_modules": ["v", "1.q"]}
    targets = find_targets(blocks(), Config(nblocks=1, **settings))
    assert targets.skipped_names == {"v": "layers.0.v", "1.q": "layers.1.q"}
    everything = Config(target_modules=".*", exclude_modules=["v"], nblocks=1)
    assert find_targets(blocks(), everything).skipped_names == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["query"]},
            r"target_modules query fits no linear layer of ModuleDict; its linear layers: la",
        ),
        ({"target_modules": "q"}, r"target_modules q fits no linear layer"),  # a whole path, as in PEFT
        ({"target_modules": ["conv"]}, r"conv is a Conv2d of torch: only nn\.Linear is rotated"),
        ({"exclude_modules": ".*"}, r"is in exclude_modules"),
        ({"modules_to_save": ["classifier"]}, r"modules_to_save: no module is called classifier"),
    ],
)
def test_nothing_matched(settings, message):
    with pytest.raises(GSOFTError, match=message):
        found(blocks(), **settings)


def test_a_bare_layer_and_a_model_without_linear_layers():
    with pytest.raises(GSOFTError, match=r"the model itself is an nn\.Linear"):
        found(nn.Linear(4, 4))
    with pytest.raises(GSOFTError, match=r"all-linear fits no linear layer of Sequential; it has none"):
        found(nn.Sequential(nn.Conv2d(4, 4, 1)))


# Layers that cannot be rotated: an error where they are named, skipped with "all-linear"


def with_peft() -> tuple[nn.Module, str]:
    import peft

    model = mlp()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
    return model, "0"


def half_quantised() -> tuple[nn.Module, str]:
    model = mlp()
    model[2].weight = nn.Parameter(torch.zeros(288, 1, dtype=torch.uint8), requires_grad=False)
    return model, "2"


class CodedTensor(torch.Tensor):
    """Stands for the quantised tensors of torchao, which say that they are floating-point numbers."""


def with_coded_weights() -> tuple[nn.Module, str]:
    model = mlp()
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(CodedTensor))
    return model, "2"


def by_bitsandbytes() -> tuple[nn.Module, str]:
    from bitsandbytes.nn import Linear8bitLt

    model = mlp()
    model[2] = Linear8bitLt(24, 24)
    return model, "2"


def parametrized() -> tuple[nn.Module, str]:
    model = mlp()
    parametrizations.orthogonal(model[2])
    return model, "2"


def adapted() -> tuple[nn.Module, str]:
    model = mlp()
    gsoft.inject(model, Config(target_modules=["0"], block_size=6))
    return model, "0"


def with_another_forward() -> tuple[nn.Module, str]:
    model = mlp()
    model[2].forward = lambda x: x
    return model, "2"


def inside_of_peft() -> tuple[nn.Module, str]:
    model, _ = with_peft()
    return model, "0.base_layer"


def attention() -> tuple[nn.Module, str]:
    return encoder_layer(), "self_attn.out_proj"


def tied() -> tuple[nn.Module, str]:
    return TiedModel(), "head"


def tied_by_data() -> tuple[nn.Module, str]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight.data = model[0].weight.data
    return model, "2"


def without_shape() -> tuple[nn.Module, str]:
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), "1"


def gpt2() -> tuple[nn.Module, str]:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8)
    return nn.Sequential(nn.Linear(4, 4), GPT2LMHeadModel(config)), "c_attn"


CANNOT = {
    with_peft: r"0 is a layer of another adapter \(Linear of peft\): merge or remove that adapter first",
    inside_of_peft: r"0\.base_layer is inside of 0, a layer of another adapter \(Linear of peft\): merge or remove",
    half_quantised: r"2 is quantised \(Linear of torch\): load the model in float32, float16 or bfloat16",
    with_coded_weights: r"2 is a Linear of torch whose weight is a CodedTensor: quantised, or spread over devices",
    by_bitsandbytes: r"2 is a Linear8bitLt of bitsandbytes whose weight is a Int8Params: quantised",
    parametrized: r"2 has a weight that is computed",
    adapted: r"0 carries a GSOFT adapter already: remove it first",
    with_another_forward: r"2 is a Linear of torch whose forward is not nn\.Linear's",
    attention: r"self_attn\.out_proj belongs to an nn\.MultiheadAttention, which uses its weight without calling it",
    tied: r"head shares its weight with embed\.weight: merging would change both; leave it out \(exclude_modules\)",
    tied_by_data: r"2 shares its weight with 0\.weight: merging would change both",
    without_shape: r"1 has no shape yet: run the model once before",
    gpt2: r"1\.transformer\.h\.0\.attn\.c_attn is a Conv1D of transformers, which stores its weight transposed",
}


@pytest.mark.parametrize("make", CANNOT, ids=lambda make: make.__name__)
def test_layers_that_cannot_be_rotated(make):
    if make is by_bitsandbytes:
        pytest.importorskip("bitsandbytes")
    model, name = make()
    with pytest.raises(GSOFTError, match=CANNOT[make]):
        found(model, target_modules=[name])
    targets = find_targets(model, Config(nblocks=1))
    assert targets.layers
    assert not any(path == name or path.endswith(f".{name}") for path in targets.layers)
    assert any(re.match(CANNOT[make], f"{path} {reason}") for path, reason in targets.skipped.items())


def test_a_block_that_happens_to_be_called_base_layer_is_no_adapter():
    model = nn.ModuleDict(
        {"net": nn.ModuleDict({"base_layer": nn.Sequential(nn.Linear(4, 4)), "top": nn.Linear(4, 4)})}
    )
    assert found(model) == ["net.base_layer.0", "net.top"]


def test_nothing_inside_of_another_adapters_layer_is_adapted():
    model, _ = with_peft()
    assert found(model) == ["2", "4"]


def test_a_language_models_output_layer_is_left_out_unless_named():
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    model = LlamaForCausalLM(config)
    targets = find_targets(model, Config(nblocks=1))
    assert len(targets.layers) == 7
    assert targets.skipped == {"lm_head": "the model's output layer; name it in target_modules to adapt it"}
    assert found(model, target_modules=["lm_head"]) == ["lm_head"]


def test_a_shared_module_to_save_is_refused():
    with pytest.raises(GSOFTError, match=r"head\.weight is shared with embed: training it would change both"):
        found(TiedModel(), target_modules=["body"], modules_to_save=["head"])


def test_a_weight_that_the_model_itself_uses_is_shared():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
            self.own = self.layer.weight
            self.bias = self.head.bias

    with pytest.raises(GSOFTError, match="layer shares its weight with own: merging would change both"):
        find_targets(Tied(), Config(target_modules=["layer"], block_size=3))
    with pytest.raises(GSOFTError, match=r"head\.bias is shared with the model"):
        find_targets(Tied(), Config(target_modules=["layer"], block_size=3, modules_to_save=["head"]))


def test_a_class_that_allows_no_subclass_is_refused_before_anything_is_changed():
    class Sealed(nn.Linear):
        def __init_subclass__(cls, *, key: str) -> None:
            super().__init_subclass__()

    class Named(nn.Linear):
        rotated = property(lambda self: True)

    for kind in (Sealed, Named):
        model = nn.Sequential(kind(6, 6))
        with pytest.raises(GSOFTError, match=f"0 is a {kind.__name__} of .*cannot be inherited from"):
            gsoft.inject(model, Config(target_modules=["0"], block_size=3))
        assert all(parameter.requires_grad for parameter in model.parameters())
