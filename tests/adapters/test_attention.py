from __future__ import annotations

import copy
import warnings

import diffusers.models.attention_dispatch as dispatch
import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from tiny_models import randomise, run, tiny_unet

from gsoft.linear import RotatedLayer
from gsoft.rotation import Rotation
from gsoft_diffusion import AdapterConfig, UserError, inject
from gsoft_diffusion.adapters import attention as attention_module
from gsoft_diffusion.adapters.attention import GSOFTAttnProcessor, GuardedAttention, attach, detach
from gsoft_diffusion.models.attention_layers import attention_layers

CONFIG = AdapterConfig(nblocks=4, text_encoder=False)


def make_attention(**kwargs) -> Attention:
    torch.manual_seed(0)
    attention = Attention(**({"query_dim": 32, "heads": 4, "dim_head": 8} | kwargs)).eval()
    for parameter in attention.parameters():  # norms too are to matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    return attention


def rotated_layers(attention: Attention, trained: bool = False) -> dict[str, RotatedLayer]:
    made = {
        name: RotatedLayer(Rotation(CONFIG, layer.in_features, layer.out_features))
        for name, layer in attention_layers(attention).items()
    }
    for index, rotated in enumerate(made.values()):
        if trained:
            randomise(rotated.rotation, seed=index)
    return made


def image(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


CASES = {
    "self": ({}, {}),
    "cross": ({"cross_attention_dim": 24}, {"encoder_hidden_states": image(2, 7, 24)}),
    "bias": ({"bias": True, "out_bias": False}, {}),
    "scale": ({"scale_qk": False}, {}),
    "upcast": ({"upcast_attention": True, "upcast_softmax": True}, {}),
    "residual and rescale": ({"residual_connection": True, "rescale_output_factor": 2.5}, {}),
    "group norm": ({"norm_num_groups": 4}, {}),
    "layer norm of q and k": ({"qk_norm": "layer_norm"}, {}),
    "rms norm of q and k": ({"qk_norm": "rms_norm"}, {}),
    "cross layer norm": (
        {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
        {"encoder_hidden_states": image(2, 7, 24)},
    ),
    "cross group norm": (
        {"cross_attention_dim": 24, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
        {"encoder_hidden_states": image(2, 7, 24)},
    ),
    "mask": ({}, {"attention_mask": torch.tensor([0.0, -10000.0]).repeat(2, 1, 8)}),
    "cross mask": (
        {"cross_attention_dim": 24},
        {"encoder_hidden_states": image(2, 7, 24), "attention_mask": -10000.0 * image(2, 1, 7).gt(0)},
    ),
    "mask per head": ({}, {"attention_mask": -10000.0 * image(8, 16, 16).gt(0)}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("four_dimensional", [False, True])
def test_equals_the_stock_processor(case, four_dimensional):
    """Bit-equal at the start; after training equal to the stock processor on the rotated weights.

    Without gradients to the last bit; with them the activations may be rotated instead, which rounds differently.
    """
    arguments, inputs = CASES[case]
    attention = make_attention(**arguments)
    stock = AttnProcessor2_0() if attention.scale_qk else AttnProcessor()
    attention.set_processor(stock)
    x = image(2, 32, 4, 4) if four_dimensional else image(2, 16, 32)

    def compare(made, in_training_tolerance, tolerance):
        attach(attention, made)
        in_training = attention(x, **inputs)
        with torch.no_grad():
            ours = attention(x, **inputs)
        for name, layer in attention_layers(attention).items():
            made[name].merge(layer)
        detach(attention, stock)
        assert ours.shape == x.shape
        merged = attention(x, **inputs)
        torch.testing.assert_close(ours, merged, **tolerance)
        torch.testing.assert_close(in_training, merged, **in_training_tolerance)
        for name, layer in attention_layers(attention).items():
            made[name].unmerge(layer)
        return ours

    exact = {"atol": 0, "rtol": 0} if attention.scale_qk else {}
    start = compare(rotated_layers(attention), exact, exact)
    trained = compare(rotated_layers(attention, trained=True), {}, exact)
    assert (trained - start).abs().max() > 1e-3


def test_spatial_norm_uses_temb():
    attention = make_attention(spatial_norm_dim=8, residual_connection=True, norm_num_groups=None)
    x, temb = image(2, 32, 4, 4), image(2, 8, 2, 2)
    expected = attention(x, temb=temb)
    attach(attention, rotated_layers(attention))
    assert torch.equal(attention(x, temb=temb), expected)


def test_dropout_of_the_output():
    attention = make_attention(dropout=1.0)
    attach(attention, rotated_layers(attention))
    assert attention(image(2, 16, 32)).abs().max() > 0
    attention.train()
    assert attention(image(2, 16, 32)).abs().max() == 0


def test_added_key_value_attention_is_refused():
    unet = tiny_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2,
    )
    with pytest.raises(UserError, match=r"unet\..*added key and value projections"):
        inject(CONFIG, unet)


@pytest.fixture
def adapted():
    unet = tiny_unet()
    adapter = inject(CONFIG, unet)
    randomise(adapter)
    with torch.no_grad():
        return unet, adapter, run(unet)


def backends(unet) -> set[str | None]:
    return {processor._attention_backend for processor in unet.attn_processors.values()}


SWITCHES = {
    "slice auto": lambda unet: unet.set_attention_slice("auto"),
    "slice max": lambda unet: unet.set_attention_slice("max"),
    "plain processor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "fused processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "dictionary": lambda unet: unet.set_attn_processor({name: SlicedAttnProcessor(1) for name in unet.attn_processors}),
    "fuse": lambda unet: unet.fuse_qkv_projections(),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("copied", [False, True])
def test_diffusers_switches_do_not_lose_what_was_trained(adapted, switch, copied):
    unet, _, expected = adapted
    if copied:
        unet = copy.deepcopy(unet)
    with pytest.warns(UserWarning, match="GSOFT's attention processor stays"):
        SWITCHES[switch](unet)
    assert all(isinstance(processor, GSOFTAttnProcessor) for processor in unet.attn_processors.values())
    assert torch.equal(run(unet), expected)


def test_switching_is_one_line_for_the_whole_unet(adapted):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        adapted[0].set_attention_slice("auto")
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_default_processor_does_not_lose_what_was_trained(adapted):
    unet, _, expected = adapted
    with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):  # diffusers' own refusal
        unet.set_default_attn_processor()
    assert torch.equal(run(unet), expected)


def test_disabling_xformers_does_not_lose_what_was_trained(adapted):
    unet, _, expected = adapted
    unet.disable_xformers_memory_efficient_attention()
    assert torch.equal(run(unet), expected)


def test_own_processors_can_be_taken_and_put_back(adapted):
    unet, _, expected = adapted
    unet.set_attn_processor(unet.attn_processors)
    assert torch.equal(run(unet), expected)


def test_a_foreign_processor_is_refused(adapted):
    unet, _, expected = adapted
    with pytest.raises(UserError, match="IPAdapterAttnProcessor2_0 would replace the trained"):
        unet.set_attn_processor(IPAdapterAttnProcessor2_0(32, 24))
    assert torch.equal(run(unet), expected)


def test_processors_that_would_be_lost_are_refused():
    unet = tiny_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(IPAdapterAttnProcessor2_0(64, 24))
    with pytest.raises(UserError, match=r"unet\.mid_block.*attn2: its IPAdapterAttnProcessor2_0 would be lost"):
        inject(CONFIG, unet)


@pytest.mark.parametrize(
    "ask",
    [
        lambda unet: unet.enable_xformers_memory_efficient_attention(),
        lambda unet: unet.set_attn_processor(XFormersAttnProcessor()),
    ],
)
def test_xformers_on_a_cpu_machine_is_a_clear_error(adapted, ask, monkeypatch):
    unet, _, expected = adapted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="xformers has no CPU kernels"):
        ask(unet)
    assert torch.equal(run(unet), expected)


def test_xformers_that_is_not_installed_is_a_clear_error(adapted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_module, "is_xformers_available", lambda: False)
    with pytest.raises(UserError, match="pip install xformers"):
        adapted[0].enable_xformers_memory_efficient_attention()


class TestWithXformers:
    """On a machine that has what xformers needs, with a stand-in for its kernel."""

    @pytest.fixture(autouse=True)
    def kernel(self, monkeypatch):
        calls = []

        def memory_efficient_attention(query, key, value, attn_mask=None, scale=None, **unused):
            calls.append(query.shape)
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale).transpose(1, 2)

        registry = dispatch._AttentionBackendRegistry
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(attention_module, "is_xformers_available", lambda: True)
        monkeypatch.setattr(attention_module, "try_xformers", lambda: None)
        monkeypatch.setattr(dispatch, "_CAN_USE_XFORMERS_ATTN", True)
        monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # put back afterwards
        monkeypatch.setitem(registry._backends, dispatch.AttentionBackendName.XFORMERS, memory_efficient_attention)
        return calls

    def test_enable_and_disable_switch_the_backend(self, adapted, kernel):
        unet, _, expected = adapted
        unet.enable_xformers_memory_efficient_attention()
        assert backends(unet) == {"xformers"}
        torch.testing.assert_close(run(unet), expected)
        assert len(kernel) == len(unet.attn_processors)
        unet.disable_xformers_memory_efficient_attention()
        assert torch.equal(run(unet), expected)
        assert len(kernel) == len(unet.attn_processors)

    def test_kernels_that_do_not_run_are_found_before_the_run(self, adapted, monkeypatch):
        def fail():
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nmore")

        monkeypatch.setattr(attention_module, "try_xformers", fail)
        with pytest.raises(
            UserError, match=r"xformers is installed but does not run here \(No operator found .*leave it out"
        ):
            adapted[0].enable_xformers_memory_efficient_attention()

    def test_set_attention_backend(self, adapted, kernel):
        unet, _, expected = adapted
        unet.set_attention_backend("xformers")
        torch.testing.assert_close(run(unet), expected)
        assert len(kernel) == len(unet.attn_processors)

    def test_a_choice_made_before_injection_is_kept_and_given_back(self):
        unet = tiny_unet()
        stock = XFormersAttnProcessor()
        unet.set_attn_processor(stock)
        adapter = inject(CONFIG, unet)
        assert backends(unet) == {"xformers"}
        adapter.remove()
        assert all(processor is stock for processor in unet.attn_processors.values())

    def test_an_operator_of_ones_own_is_not_taken(self, adapted):
        with pytest.warns(UserWarning, match="attention_op was ignored"):
            adapted[0].enable_xformers_memory_efficient_attention(attention_op="some operator")


def test_native_backend_is_selectable(adapted, monkeypatch):
    unet, _, expected = adapted
    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    unet.set_attention_backend("native")
    assert backends(unet) == {"native"}
    assert torch.equal(run(unet), expected)


def test_attentions_stay_attentions(adapted):
    unet, adapter, _ = adapted
    modules = [module for module in unet.modules() if isinstance(module, Attention)]
    assert {type(module) for module in modules} == {GuardedAttention}
    adapter.remove()
    assert {type(module) for module in modules} == {Attention}
