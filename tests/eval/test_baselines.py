"""PEFT's methods and full fine-tuning: on the same layers as GSOFT, and really what they claim to be."""

from __future__ import annotations

import json

import pytest
import torch
from peft.tuners.boft import layer as boft
from tiny_models import randomise, run, tiny_text_encoder, tiny_unet, train

from eval.baselines import (
    BaselineConfig,
    ButterflyLinear,
    baseline_count,
    expected_parameters,
    inject_baseline,
    load_baseline,
    rotate_rows,
)
from gsoft_diffusion import AdapterConfig, BaseModelIdentity, UserError, inject, save_adapter
from gsoft_diffusion.config.training import TrainingConfig
from gsoft_diffusion.training.optimizer import make_optimizer

CONFIGS = {
    "lora": BaselineConfig("lora", rank=3),
    "dora": BaselineConfig("dora", rank=3),
    "hra": BaselineConfig("hra", rank=4),
    "lokr": BaselineConfig("lokr", factor=2),
    "lokr by rank": BaselineConfig("lokr", factor=2, rank=3),
    "boft": BaselineConfig("boft", nblocks=4, nfactors=3),
    "boft by block size": BaselineConfig("boft", block_size=4, nfactors=2),
    "oft": BaselineConfig("oft", block_size=4),
    "oft by blocks": BaselineConfig("oft", nblocks=4),
    "full": BaselineConfig("full"),
    "unet only": BaselineConfig("lora", rank=2, text_encoder=False),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def tuned(config, seed=0):
    unet, text_encoder = tiny_unet(seed), tiny_text_encoder(seed)
    return unet, text_encoder, inject_baseline(config, unet, [text_encoder])


# BOFT against the paper


def butterfly_factor(blocks: torch.Tensor, level: int) -> torch.Tensor:
    """The dense factor of the paper's §4: half blocks `2^level` apart are paired within groups of `2^(level+1)`."""
    count, size, _ = blocks.shape
    half, stride = size // 2, 2**level
    pairs = [(first, first + stride) for first in range(2 * count) if first // stride % 2 == 0]
    factor = torch.zeros(count * size, count * size, dtype=blocks.dtype)
    for block, pair in zip(blocks, pairs, strict=True):
        rows = torch.cat([torch.arange(half) + chunk * half for chunk in pair])
        factor[rows[:, None], rows[None, :]] = block
    return factor


@pytest.mark.parametrize(("nblocks", "size", "nfactors"), [(2, 2, 2), (4, 6, 3), (8, 2, 4), (8, 4, 1), (12, 4, 3)])
def test_butterfly_is_the_papers_product_of_factors(nblocks, size, nfactors):
    blocks = torch.randn(nfactors, nblocks, size, size, dtype=torch.float64)
    product_of_factors = torch.eye(nblocks * size, dtype=torch.float64)
    for level, factor in enumerate(blocks):
        product_of_factors = butterfly_factor(factor, level) @ product_of_factors
    rows = torch.randn(3, nblocks * size, dtype=torch.float64)
    torch.testing.assert_close(rotate_rows(rows, blocks), rows @ product_of_factors.T)


def test_butterfly_is_what_pefts_own_permutations_give():
    """PEFT's dense path, with the block-diagonal matrices that its CUDA extension would return."""
    layer = boft.Linear.__new__(boft.Linear)  # its methods are all that is wanted
    nblocks, size, nfactors = 8, 4, 4
    blocks = torch.randn(nfactors, nblocks, size, size)
    rotation = torch.eye(nblocks * size)
    for level in range(nfactors):
        shuffle = layer.perm2mat(
            layer.block_butterfly_perm(nblocks * size, nblocks // 2**level, size // 2, nfactors - 1)
        )
        rotation = shuffle @ torch.block_diag(*blocks[level]) @ shuffle.T @ rotation
    torch.testing.assert_close(rotate_rows(torch.eye(nblocks * size), blocks), rotation.T)


def test_boft_runs_with_all_its_factors_forward_and_backward():
    torch.manual_seed(0)
    unet, text_encoder, adapter = tuned(CONFIGS["boft"])
    layers = [module for module in unet.modules() if isinstance(module, boft.Linear)]
    assert layers
    assert all(isinstance(layer, ButterflyLinear) for layer in layers)
    assert all(layer.boft_R["default"].shape[:2] == (3, 4) for layer in layers)
    randomise(adapter)
    layer = layers[0]
    blocks = layer.blocks().detach().double()
    rotation = torch.eye(layer.in_features, dtype=torch.float64)
    for level, factor in enumerate(blocks):
        rotation = butterfly_factor(factor, level) @ rotation
    assert (rotation != 0).sum(1).eq(min(layer.in_features, 8 * 2**2)).all()  # m factors reach b·2^(m−1) inputs
    weight = layer.boft_s["default"].detach().double() * (layer.base_layer.weight.double() @ rotation.T)
    x = torch.randn(5, layer.in_features)
    bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T + bias, rtol=1e-4, atol=1e-5)
    run(unet, text_encoder).square().mean().backward()
    assert all(
        parameter.grad.flatten(2).ne(0).any(-1).all()
        for name, parameter in adapter.named_parameters()
        if name.endswith("to_v.rotation")
    )  # every block of every factor learns


# DoRA, HRA and LoKr against their papers


def tuned_layer(name):
    """A tuned layer with random numbers: the layer, its adapter, the frozen weight and the weight that it acts with."""
    torch.manual_seed(0)
    _, _, adapter = tuned(CONFIGS[name])
    randomise(adapter, size=0.1)
    layer = next(iter(adapter._layers.values()))
    weight = layer.base_layer.weight.detach().double()
    inputs = torch.eye(layer.in_features)
    bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.double()
    return layer, adapter, weight, (layer(inputs).double() - bias).T.detach()


def numbers_of(adapter, layer):
    name = next(name for name, each in adapter._layers.items() if each is layer)
    return {
        key.rpartition(".")[2]: value.detach().double()
        for key, value in adapter.named_parameters()
        if key.rpartition(".")[0] == name
    }


def test_dora_is_a_magnitude_times_a_direction():
    """Row `i` of the weight has the length `m_i` and the direction of row `i` of `W + BA` (arXiv 2402.09353, eq. 5)."""
    layer, adapter, weight, found = tuned_layer("dora")
    numbers = numbers_of(adapter, layer)
    moved = weight + numbers["lora_b"] @ numbers["lora_a"]
    expected = numbers["magnitude"][:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hra_is_a_chain_of_reflections():
    """`W ∏ (I − 2 u uᵀ / uᵀu)` (arXiv 2405.17484, eq. 1)."""
    layer, adapter, weight, found = tuned_layer("hra")
    expected = weight
    for vector in numbers_of(adapter, layer)["reflections"].T:
        expected = expected - 2 * (expected @ vector)[:, None] * vector[None, :] / vector.square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lokr", "lokr by rank"])
def test_lokr_adds_a_kronecker_product(name):
    """`W + w₁ ⊗ w₂` (arXiv 2309.14859)."""
    layer, adapter, weight, found = tuned_layer(name)
    numbers = numbers_of(adapter, layer)
    assert numbers["small"].shape == (2, 2)
    if name == "lokr by rank":
        numbers["large"] = numbers["large_a"] @ numbers["large_b"]
    torch.testing.assert_close(found, weight + torch.kron(numbers["small"], numbers["large"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lokr", "lokr by rank"])
def test_lokrs_large_matrix_learns_from_the_start(name):
    """As LyCORIS starts it: the small matrix is random and the large one 0, so that the gradient reaches the latter."""
    unet, text_encoder, adapter = tuned(CONFIGS[name])
    last = "large_b" if name == "lokr by rank" else "large"
    run(unet, text_encoder).square().mean().backward()
    for key, parameter in adapter.named_parameters():
        if key.endswith(".small"):
            assert parameter.abs().min() > 0
        if key.endswith(f".{last}"):
            assert not parameter.any()
            assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize(("name", "at_rest"), [("dora", "magnitude"), ("boft", "output_scale")])
def test_weight_decay_leaves_alone_what_is_not_zero_at_rest(name, at_rest):
    rates = {"learning_rate": 1e-3, "text_encoder_lr": 1e-3, "adam_weight_decay": 0.5}
    adapter = tuned(CONFIGS[name])[2]
    optimizer = make_optimizer(TrainingConfig(instance_data_dir="photos", class_word="dog", **rates), adapter)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in adapter.named_parameters():
        assert decay[id(parameter)] == (0.0 if key.endswith(at_rest) else 0.5)


def test_pefts_own_fallback_is_not_left_behind():
    before = boft._FBD_CUDA
    tuned(CONFIGS["boft"])
    assert boft._FBD_CUDA is before


# What all have in common


def test_start_is_neutral_and_same_layers_as_gsoft(config):
    base = run(tiny_unet(), tiny_text_encoder())
    unet, text_encoder, adapter = tuned(config)
    torch.testing.assert_close(run(unet, text_encoder), base, rtol=0, atol=1e-5)
    gsoft = inject(AdapterConfig(nblocks=4, text_encoder=config.text_encoder), tiny_unet(), [tiny_text_encoder()])
    layers = {name.rpartition(".")[0] for name, _ in adapter.named_parameters()}
    assert layers == {name.rpartition(".")[0] for name, _ in gsoft.named_parameters()}


def test_exactly_the_adapters_parameters_train(config):
    unet, text_encoder, adapter = tuned(config)
    trainable = {id(p) for model in (unet, text_encoder) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter.parameters()}
    before = [p.clone() for model in (unet, text_encoder) for p in model.parameters() if not p.requires_grad]
    randomise(adapter, size=0.05)
    target = torch.randn(2, 4, 8, 8)
    losses = train(adapter, lambda: (run(unet, text_encoder) - target).square().mean())
    assert losses[-1] < losses[0]
    after = [p for model in (unet, text_encoder) for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_parameter_counts_are_the_closed_form(config):
    _, _, adapter = tuned(config)
    counts = adapter.parameter_counts()
    stored = sum(parameter.numel() for parameter in adapter.parameters())
    if config.method == "boft":  # PEFT stores whole blocks: their skew parts are what acts
        stored = sum(
            p.numel() if name.endswith("output_scale") else p.numel() * (p.shape[-1] - 1) // (2 * p.shape[-1])
            for name, p in adapter.named_parameters()
        )
    assert counts["total"] == stored
    assert counts["unet"] + counts["text_encoder"] == stored
    assert (counts["text_encoder"] > 0) is config.text_encoder


def test_counts_by_hand():
    assert baseline_count(BaselineConfig("lora", rank=4), 320, 640) == 4 * 960
    assert baseline_count(BaselineConfig("boft", nblocks=32, nfactors=4), 320, 640) == 4 * 32 * 45 + 640
    assert baseline_count(BaselineConfig("oft", block_size=10), 320, 640) == 32 * 45
    assert baseline_count(BaselineConfig("full"), 320, 640) == 320 * 640
    assert baseline_count(BaselineConfig("dora", rank=4), 320, 640) == 4 * 960 + 640
    assert baseline_count(BaselineConfig("hra", rank=4), 320, 640) == 4 * 320
    assert baseline_count(BaselineConfig("lokr", factor=4), 320, 640) == 4 * 4 + 80 * 160
    assert baseline_count(BaselineConfig("lokr", factor=4, rank=80), 320, 640) == 4 * 4 + 80 * 160
    assert baseline_count(BaselineConfig("lokr", factor=4, rank=79), 320, 640) == 4 * 4 + 79 * 240


def test_merge_unmerge_and_disabled(config):
    unet, text_encoder, adapter = tuned(config)
    base = run(unet, text_encoder)
    weights = [linear.weight.clone() for linear in adapter._linears.values()]
    randomise(adapter, size=0.1)
    active = run(unet, text_encoder)
    assert (active - base).abs().max() > 1e-3
    adapter.merge()
    assert adapter.merged
    torch.testing.assert_close(run(unet, text_encoder), active, rtol=1e-4, atol=1e-4)
    with adapter.disabled():
        torch.testing.assert_close(run(unet, text_encoder), base, rtol=0, atol=1e-5)
    assert adapter.merged
    adapter.merge()  # a second time changes nothing
    torch.testing.assert_close(run(unet, text_encoder), active, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert not adapter.merged
    assert all(torch.equal(a.weight, b) for a, b in zip(adapter._linears.values(), weights, strict=True))
    assert torch.equal(run(unet, text_encoder), active)
    with adapter.disabled():
        torch.testing.assert_close(run(unet, text_encoder), base, rtol=0, atol=1e-5)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    assert torch.equal(run(unet, text_encoder), active)


def test_remove_gives_the_models_back(config):
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    base = run(unet, text_encoder)
    names = {model: list(model.state_dict()) for model in (unet, text_encoder)}
    adapter = inject_baseline(config, unet, [text_encoder])
    randomise(adapter)
    adapter.merge()
    adapter.remove()
    assert torch.equal(run(unet, text_encoder), base)
    assert {model: list(model.state_dict()) for model in (unet, text_encoder)} == names
    assert all(p.requires_grad for p in unet.parameters())
    assert not hasattr(unet, "peft_config")
    inject(AdapterConfig(nblocks=4), unet, [text_encoder])  # nothing stands in the way of another adapter


def test_save_and_load(config, tmp_path):
    unet, text_encoder, adapter = tuned(config)
    randomise(adapter, size=0.1)
    active = run(unet, text_encoder)
    identity = BaseModelIdentity("tiny", "0" * 16)
    save_adapter(tmp_path / "a.safetensors", adapter, base_model=identity, training={}, prompts={})
    other = tiny_unet(), tiny_text_encoder()
    loaded = load_baseline(tmp_path / "a.safetensors", other[0], [other[1]])
    assert loaded.config == config
    assert torch.equal(run(*other), active)


def test_load_refuses_what_does_not_fit(tmp_path):
    _, _, adapter = tuned(CONFIGS["lora"])
    path, identity = tmp_path / "a.safetensors", BaseModelIdentity("tiny", "0" * 16)
    save_adapter(path, adapter, base_model=identity, training={}, prompts={})
    unet = tiny_unet(block_out_channels=(32, 96))
    names = list(unet.state_dict())
    with pytest.raises(UserError, match="does not fit its base model"):
        load_baseline(path, unet, [tiny_text_encoder()])
    assert list(unet.state_dict()) == names
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not the file of a baseline"):
        load_baseline(path, tiny_unet(), [tiny_text_encoder()])


def test_half_precision_base_keeps_float32_trainables(config):
    unet, text_encoder = tiny_unet().to(torch.bfloat16), tiny_text_encoder().to(torch.bfloat16)
    adapter = inject_baseline(config, unet, [text_encoder])
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    output = run(unet, text_encoder, torch.bfloat16)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert any(parameter.grad is not None for parameter in adapter.parameters())


def test_orthogonality_is_reported_where_there_is_any():
    errors = {}
    for name in ("lora", "dora", "lokr", "boft", "oft", "hra", "full"):
        _, _, adapter = tuned(CONFIGS[name])
        randomise(adapter, size=0.05)
        errors[name] = adapter.orthogonality_error()
    assert errors["lora"] is errors["dora"] is errors["lokr"] is errors["full"] is None
    assert errors["boft"] < 1e-5
    assert errors["hra"] < 1e-5
    assert 1e-5 < errors["oft"] < 0.1  # a short Neumann series only comes near


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lora"}, "lora takes rank as its size, not nothing"),
        ({"method": "lora", "rank": 4, "nblocks": 4}, "lora takes rank"),
        ({"method": "boft", "nblocks": 4}, "boft takes nblocks and nfactors or block_size and nfactors"),
        ({"method": "oft", "nblocks": 4, "block_size": 4}, "oft takes nblocks or block_size"),
        ({"method": "full", "rank": 4}, "full takes nothing"),
        ({"method": "lora", "rank": 0}, "--rank 0: must be 1 or more"),
        ({"method": "hra", "rank": 3}, "rank 3: must be even for hra"),
        ({"method": "lokr", "rank": 3}, "lokr takes factor or factor and rank as its size, not rank"),
        ({"method": "vera", "rank": 4}, "method: 'vera' is not one of"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        BaselineConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BaselineConfig("oft", block_size=5), r"has width \d+, which block_size 5 does not divide"),
        (BaselineConfig("boft", nblocks=4, nfactors=4), "BOFT with 4 factors needs blocks of even side, 8 of them"),
        (BaselineConfig("boft", nblocks=8, nfactors=2), "width 24 has 8 of side 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_and_change_nothing(config, message):
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    names = list(unet.state_dict())
    with pytest.raises(UserError, match=message):
        inject_baseline(config, unet, [text_encoder])
    assert list(unet.state_dict()) == names
    assert all(p.requires_grad for p in unet.parameters())


def test_settings_round_trip():
    for config in CONFIGS.values():
        assert BaselineConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_claim_that_peft_does_not_keep_is_refused(monkeypatch):
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: None)  # what PEFT finds on a machine without CUDA
    with pytest.raises(AssertionError, match=r"PEFT made .*\(1, 4, 8, 8\).* where boft has .*\(3, 4, 8, 8\)"):
        tuned(CONFIGS["boft"])


@pytest.mark.parametrize("nfactors", [1, 2, 4, 6])
def test_the_papers_boft_fits_stable_diffusion(nfactors):
    config = BaselineConfig("boft", nblocks=32, nfactors=nfactors)
    for width in (320, 640, 1280, 768, 1024):
        shapes = expected_parameters(config, width, 320, "layer")
        assert shapes["rotation"] == (nfactors, 32, width // 32, width // 32)
