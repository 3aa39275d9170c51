from __future__ import annotations

import copy
import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from tiny_models import randomise, run, tiny_text_encoder, tiny_unet, tokens, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.bases import CLIP_G, CLIP_H, CLIP_L, SD15, SD21
from gsoft_diffusion import AdapterConfig, UserError, inject
from gsoft_diffusion.adapters.injection import expected_shapes
from gsoft_diffusion.models.attention_layers import CLIP_PROJECTIONS

CONFIG = AdapterConfig(nblocks=4)
DTYPES = [torch.float32, torch.bfloat16]


def adapted(config: AdapterConfig = CONFIG, dtype: torch.dtype = torch.float32, trained: bool = True):
    unet, text_encoder = tiny_unet().to(dtype), tiny_text_encoder().to(dtype)
    adapter = inject(config, unet, [text_encoder])
    if trained:
        randomise(adapter)
    return unet, text_encoder, adapter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nfactors", [2, 3, "dense"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("parametrization", ["cayley", "exp"])
def test_the_start_is_bit_equal_to_the_base(dtype, nfactors, double, parametrization):
    unet, text_encoder = tiny_unet().to(dtype), tiny_text_encoder().to(dtype)
    before = run(unet, text_encoder, dtype)
    inject(
        AdapterConfig(nblocks=4, nfactors=nfactors, double=double, parametrization=parametrization),
        unet,
        [text_encoder],
    )
    assert torch.equal(run(unet, text_encoder, dtype), before)
    with torch.no_grad():
        assert torch.equal(run(unet, text_encoder, dtype), before)


def test_names_do_not_depend_on_library_versions():
    text_encoders = [tiny_text_encoder(), tiny_text_encoder(with_projection=True)]
    adapter = inject(CONFIG, tiny_unet(), text_encoders)
    names = set(adapter.state_dict())
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    parameters = ("q_in", "q_out", "output_scale")
    for attention, name, parameter in itertools.product(
        ("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out"), parameters
    ):
        assert f"unet.{block}.{attention}.{name}.{parameter}" in names
    for root, layer, name, parameter in itertools.product(
        ("text_encoder", "text_encoder_2"), (0, 1), CLIP_PROJECTIONS, parameters
    ):
        assert f"{root}.layers.{layer}.{name}.{parameter}" in names
    assert len({name.rpartition(".")[0] for name in names if name.startswith("text_encoder")}) == 2 * 2 * 4
    assert len(names) == 3 * (8 * 4 + 16) + 3 * 4 * (len(names) // 12 - 12)  # whole layers only
    assert names == {name for name, _ in adapter.named_parameters()}


def test_expected_shapes_are_those_of_the_adapter():
    for config in (CONFIG, AdapterConfig(block_size=4, nfactors="dense", output_scale=False, text_encoder=False)):
        shapes = expected_shapes(config, tiny_unet(), [tiny_text_encoder()])
        adapter = inject(config, tiny_unet(), [tiny_text_encoder()])
        assert shapes == {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}


def test_only_the_adapter_trains():
    unet, text_encoder, adapter = adapted()
    assert not any(parameter.requires_grad for model in (unet, text_encoder) for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    base_before = copy.deepcopy([unet.state_dict(), text_encoder.state_dict()])
    before = copy.deepcopy(adapter.state_dict())
    train(adapter, lambda: run(unet, text_encoder).square().mean())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    for model, old in zip((unet, text_encoder), base_before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_lowers_a_loss_and_keeps_q_orthogonal(dtype):
    unet, text_encoder, adapter = adapted(dtype=dtype, trained=False)
    assert adapter.orthogonality_error() == 0
    target = run(tiny_unet(seed=1).to(dtype), None, dtype).detach()
    losses = train(adapter, lambda: (run(unet, text_encoder, dtype) - target).float().square().mean(), steps=15)
    assert losses[-1] < 0.9 * losses[0]
    assert 0 < adapter.orthogonality_error() < 1e-5
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_unmerge_and_disable(dtype):
    unet, text_encoder = tiny_unet().to(dtype), tiny_text_encoder().to(dtype)
    weights = copy.deepcopy([unet.state_dict(), text_encoder.state_dict()])
    with torch.no_grad():
        base = run(unet, text_encoder, dtype)
        adapter = inject(CONFIG, unet, [text_encoder])
        randomise(adapter)
        trained = run(unet, text_encoder, dtype)
        assert not torch.equal(trained, base)

        adapter.merge()
        assert adapter.merged
        torch.testing.assert_close(run(unet, text_encoder, dtype), trained)
        plain_unet, plain_text = tiny_unet().to(dtype), tiny_text_encoder().to(dtype)
        plain_unet.load_state_dict(unet.state_dict())
        plain_text.load_state_dict(text_encoder.state_dict())
        torch.testing.assert_close(run(plain_unet, plain_text, dtype), trained)

        with adapter.disabled():
            assert torch.equal(run(unet, text_encoder, dtype), base)
        assert adapter.merged
        torch.testing.assert_close(run(unet, text_encoder, dtype), trained)

        adapter.unmerge()
        assert not adapter.merged
        for model, old in zip((unet, text_encoder), weights, strict=True):
            assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
        with adapter.disabled(), adapter.disabled():
            assert torch.equal(run(unet, text_encoder, dtype), base)
        assert torch.equal(run(unet, text_encoder, dtype), trained)


@pytest.mark.parametrize("merged", [False, True])
def test_remove_gives_everything_back(merged):
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    unet.conv_in.requires_grad_(False)
    processors = {name: (AttnProcessor if "attn2" in name else AttnProcessor2_0)() for name in unet.attn_processors}
    unet.set_attn_processor(dict(processors))
    before = [
        (
            model.state_dict(),
            dict(model.named_modules()),
            {name: p.requires_grad for name, p in model.named_parameters()},
        )
        for model in (unet, text_encoder)
    ]
    types = [{name: type(module) for name, module in modules.items()} for _, modules, _ in before]
    base = run(unet, text_encoder)
    adapter = inject(CONFIG, unet, [text_encoder])
    randomise(adapter)
    if merged:
        adapter.merge()
    adapter.remove()
    assert torch.equal(run(unet, text_encoder), base)
    assert unet.attn_processors == processors
    for model, (state, modules, grads), kinds in zip((unet, text_encoder), before, types, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert dict(model.named_modules()) == modules
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    inject(CONFIG, unet, [text_encoder])  # and it can be adapted again


def test_text_encoder_can_be_left_out():
    text_encoder = tiny_text_encoder()
    expected = text_encoder(tokens())[0]
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), tiny_unet(), [text_encoder])
    randomise(adapter)
    assert torch.equal(text_encoder(tokens())[0], expected)
    assert not any(parameter.requires_grad for parameter in text_encoder.parameters())
    assert adapter.parameter_counts()["text_encoder"] == 0


@pytest.mark.parametrize("with_projection", [False, True])
def test_text_encoder_is_rotated_before_its_biases(with_projection):
    """Equal to a plain encoder whose weights, and not its biases, are replaced by s·Q_out W Q_in."""
    text_encoder, plain = (tiny_text_encoder(with_projection=with_projection) for _ in range(2))
    for model in (text_encoder, plain):
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    adapter = inject(CONFIG, tiny_unet(), [text_encoder])
    randomise(adapter)
    with torch.no_grad():
        for name, linear in plain.named_modules():
            if name.endswith(CLIP_PROJECTIONS):
                layer, attribute = name.split("layers.")[1].split(".")[0], name.rpartition(".")[2]
                rotated = adapter.rotated(f"text_encoder.layers.{layer}.{attribute}")
                linear.weight.copy_(rotated.rotated_weight(linear.weight))
        assert torch.equal(text_encoder(tokens())[0], plain(tokens())[0])


def test_text_encoder_gets_gradients_through_the_unet():
    unet, text_encoder, adapter = adapted()
    run(unet, text_encoder).square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_casting_the_models_leaves_the_trainables_float32():
    unet, text_encoder, adapter = adapted()
    before = copy.deepcopy(adapter.state_dict())
    unet.to(torch.bfloat16)
    text_encoder.half()
    adapter.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    assert all(tensor.dtype == torch.float32 for tensor in adapter.state_dict().values())


def test_the_models_look_untouched_and_save_as_base_models(tmp_path):
    unet, text_encoder, _ = adapted()
    assert set(unet.state_dict()) == set(tiny_unet().state_dict())
    assert set(text_encoder.state_dict()) == set(tiny_text_encoder().state_dict())
    unet.save_pretrained(tmp_path / "unet")
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    saved = run(UNet2DConditionModel.from_pretrained(tmp_path / "unet"))
    assert torch.equal(saved, run(tiny_unet()))
    text = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")(tokens())[0]
    assert torch.equal(text, tiny_text_encoder()(tokens())[0])


def test_merged_models_save_as_plain_models(tmp_path):
    unet, text_encoder, adapter = adapted()
    with torch.no_grad():
        trained = run(unet, text_encoder)
    adapter.merge()
    unet.save_pretrained(tmp_path / "unet")
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    text = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    torch.testing.assert_close(run(plain, text), trained)


def test_copies_of_the_models_are_independent():
    unet, text_encoder, adapter = adapted()
    with torch.no_grad():
        before = run(unet, text_encoder)
        copied_unet, copied_text = copy.deepcopy(unet), copy.deepcopy(text_encoder)
        randomise(adapter, seed=1)
        assert torch.equal(run(copied_unet, copied_text), before)
        assert not torch.equal(run(unet, text_encoder), before)


def test_a_module_that_holds_everything_can_be_copied():
    """As an accelerator or an exponential average may do."""
    unet, text_encoder, adapter = adapted()
    whole = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder, "adapter": adapter})
    copied = copy.deepcopy(whole)
    randomise(copied["adapter"], seed=1)
    with torch.no_grad():
        assert not torch.equal(run(copied["unet"], copied["text_encoder"]), run(unet, text_encoder))
        copied["adapter"].remove()
        assert torch.equal(run(copied["unet"], copied["text_encoder"]), run(tiny_unet(), tiny_text_encoder()))


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        unet, text_encoder, adapter = adapted()
        unet.train()
        text_encoder.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
            text_encoder.gradient_checkpointing_enable()
        run(unet, text_encoder).square().mean().backward()
        return [parameter.grad for parameter in adapter.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_autocast_keeps_the_base_dtype_rules():
    unet, text_encoder, adapter = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(unet, text_encoder).float().square().mean()
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


@pytest.mark.parametrize("config", [{"nblocks": 8}, {"block_size": 4}, {"nblocks": 4, "nfactors": "dense"}])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("output_scale", [True, False])
def test_counts_equal_the_closed_form(config, double, output_scale):
    adapter = inject(
        AdapterConfig(**config, double=double, output_scale=output_scale), tiny_unet(), [tiny_text_encoder()]
    )
    counts = adapter.parameter_counts()
    assert counts["total"] == counts["unet"] + counts["text_encoder"]
    assert counts["text_encoder"] == sum(
        p.numel() for n, p in adapter.named_parameters() if n.startswith("text_encoder")
    )
    if config.get("nfactors") != "dense":

        def rotation(width: int) -> int:
            size = config.get("block_size") or width // config["nblocks"]
            return 2 * width * (size - 1) // 2

        by_hand = 8 * (rotation(24) * (2 if double else 1) + (24 if output_scale else 0))  # 2 layers of 4
        assert counts["text_encoder"] == by_hand


class TestRefusals:
    """Every refusal comes before anything is changed."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                AdapterConfig(nblocks=12),
                r"unet\.down_blocks\.0.*attn1\.to_q\.q_in has width 32.*nblocks 12.*valid: 1, 2, 4, 8, 16$",
            ),
            (AdapterConfig(block_size=16), r"unet\..*attn2\.to_k\.q_in has width 24.*valid: 2, 3, 4, 6, 8, 12, 24$"),
            (AdapterConfig(nblocks=16), r"attn2\.to_k\.q_in has width 24.*nblocks 16.*valid: 1, 2, 3, 4, 6, 8, 12$"),
        ],
    )
    def test_a_width_that_does_not_fit(self, config, message):
        unet, text_encoder = tiny_unet(), tiny_text_encoder()
        with pytest.raises(UserError, match=message):
            inject(config, unet, [text_encoder])
        assert all(isinstance(processor, AttnProcessor2_0) for processor in unet.attn_processors.values())
        assert all(parameter.requires_grad for parameter in unet.parameters())

    def test_a_second_adapter(self):
        unet, text_encoder, _ = adapted()
        with pytest.raises(UserError, match="carries a GSOFT adapter already"):
            inject(CONFIG, unet, [tiny_text_encoder()])
        with pytest.raises(UserError, match=r"text_encoder\.layers\.0\.q_proj is a RotatedLinear"):
            inject(CONFIG, tiny_unet(), [text_encoder])

    def test_a_missing_text_encoder(self):
        with pytest.raises(UserError, match="no text encoder was given"):
            inject(CONFIG, tiny_unet())

    def test_a_text_encoder_without_clip_attention(self):
        with pytest.raises(UserError, match="text_encoder: Linear has no CLIP attention"):
            inject(CONFIG, tiny_unet(), [torch.nn.Linear(2, 2)])

    def test_a_unet_without_attention(self):
        with pytest.raises(UserError, match="no attention to adapt in Linear"):
            inject(AdapterConfig(nblocks=4, text_encoder=False), torch.nn.Linear(2, 2))

    def test_a_layer_under_another_adapter(self):
        unet = tiny_unet()
        attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
        attention.to_v = torch.nn.Sequential(attention.to_v)
        with pytest.raises(UserError, match=r"attn1\.to_v is a Sequential: remove the adapter"):
            inject(CONFIG, unet, [tiny_text_encoder()])


SD15_TEXT, SD21_TEXT = CLIPTextConfig(**CLIP_L), CLIPTextConfig(**CLIP_H)
WIDTHS = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280)  # one per transformer


@pytest.mark.parametrize(
    ("unet_config", "text_config"), [(SD15, SD15_TEXT), (SD21, SD21_TEXT)], ids=["SD 1.5", "SD 2.1"]
)
@pytest.mark.parametrize(
    ("nblocks", "block_size", "nfactors"),
    [(64, None, 2), (32, None, 2), (16, None, 2), (None, 32, 2), (None, 64, 3), (64, None, "dense")],
)
def test_fits_the_real_models(unet_config, text_config, nblocks, block_size, nfactors):
    """All widths of the published models, counted on the meta device against the closed form."""
    with torch.device("meta"):
        unet, text_encoder = UNet2DConditionModel(**unet_config), CLIPTextModel(text_config)
    config = AdapterConfig(nblocks=nblocks, block_size=block_size, nfactors=nfactors)
    counts = inject(config, unet, [text_encoder]).parameter_counts()

    def rotation(width: int) -> int:
        size = block_size or width // nblocks
        factors = {5: 4, 10: 3, 12: 3, 16: 3, 20: 3}[size] if nfactors == "dense" else nfactors
        return factors * width * (size - 1) // 2

    def linear(in_features: int, out_features: int) -> int:
        return rotation(in_features) + rotation(out_features) + out_features

    text = unet_config["cross_attention_dim"]
    assert counts["unet"] == sum(6 * linear(width, width) + 2 * linear(text, width) for width in WIDTHS)
    assert counts["text_encoder"] == text_config.num_hidden_layers * 4 * linear(text, text)


def test_sdxl_text_encoders_are_found():
    """The second encoder has another class, and in some versions of transformers another path to its layers."""
    config = CLIPTextConfig(**CLIP_G | {"num_hidden_layers": 2})
    with torch.device("meta"):
        encoders = [CLIPTextModel(SD15_TEXT), CLIPTextModelWithProjection(config)]
        unet = tiny_unet().to("meta")
    names = set(inject(AdapterConfig(nblocks=4), unet, encoders).state_dict())
    assert "text_encoder.layers.11.out_proj.q_out" in names
    assert "text_encoder_2.layers.1.out_proj.q_out" in names


@pytest.mark.slow
@pytest.mark.parametrize("unet_config", [SD15, SD21], ids=["SD 1.5", "SD 2.1"])
def test_the_real_unets_run_and_train(unet_config):
    """Full width and depth in bfloat16 with random weights, 8 × 8 latents: bit-equal at the start, then one step."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = UNet2DConditionModel(**unet_config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    latents = torch.randn(1, 4, 8, 8).bfloat16()
    text = torch.randn(1, 77, unet_config["cross_attention_dim"]).bfloat16()

    def forward() -> torch.Tensor:
        return unet(latents, torch.tensor([500]), text).sample

    with torch.no_grad():
        before = forward()
    adapter = inject(AdapterConfig(nblocks=64, text_encoder=False), unet)
    (loss,) = train(adapter, lambda: forward().float().square().mean(), steps=1)
    assert loss == before.float().square().mean().item()
    assert adapter.orthogonality_error() < 1e-5
    with torch.no_grad():
        after = forward()
    assert after.isfinite().all()
    assert not torch.equal(after, before)
