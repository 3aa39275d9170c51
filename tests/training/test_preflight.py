from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from tiny_families import WRITERS

from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig, TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models import loading
from gsoft_diffusion.models.frozen_storage import store, stored_layers
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training import preflight
from gsoft_diffusion.training.optimizer import make_optimizer
from gsoft_diffusion.training.preflight import OPTIMIZER_BYTES, check_step, estimate_for, needed_bytes, switches
from gsoft_diffusion.training.preparation import with_model_defaults

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    "photos", class_word="dog", adapter=AdapterConfig(nblocks=4), learning_rate=1e-4, train_batch_size=4
)


@pytest.fixture(scope="module")
def adapted(base):
    model = load_model(str(base))
    return model, inject(CONFIG.adapter, model.denoiser, model.text_encoders)


def weights_of(model) -> int:
    parts = (model.unet, model.text_encoder, model.vae)
    return sum(parameter.nbytes for part in parts for parameter in part.parameters())


def with_free(monkeypatch, model, count: int) -> None:
    """Let there be so many bytes, for the weights as well."""
    monkeypatch.setattr(preflight, "free_memory", lambda device: count - weights_of(model))


def test_what_fits_goes_on(adapted, monkeypatch):
    with_free(monkeypatch, adapted[0], needed_bytes(CONFIG, *adapted, CPU))
    check_step(CONFIG, *adapted, CPU)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"gradient_checkpointing": True}, "--gradient_checkpointing"),
        (
            {"gradient_checkpointing": True, "mixed_precision": "bf16"},
            "--mixed_precision bf16 --gradient_checkpointing",
        ),
        (
            {
                "gradient_checkpointing": True,
                "mixed_precision": "bf16",
                "train_batch_size": 2,
                "gradient_accumulation_steps": 2,
            },
            "--train_batch_size 2 --gradient_accumulation_steps 2 --mixed_precision bf16 --gradient_checkpointing",
        ),
    ],
)
def test_the_fewest_switches_that_fit_are_named(adapted, monkeypatch, changes, flags):
    with_free(monkeypatch, adapted[0], needed_bytes(replace(CONFIG, **changes), *adapted, CPU))
    with pytest.raises(
        UserError, match=rf"not enough memory for training: .* on cpu; {flags} would make it 0\.\d\d GB"
    ):
        check_step(CONFIG, *adapted, CPU)


def test_it_says_if_nothing_is_enough(adapted, monkeypatch):
    with_free(monkeypatch, adapted[0], 1000)
    with pytest.raises(
        UserError, match=r"no switch is enough: with .*--train_batch_size 1 .* it still takes 0\.\d\d GB"
    ):
        check_step(CONFIG, *adapted, CPU)
    least = replace(
        CONFIG, train_batch_size=1, gradient_checkpointing=True, mixed_precision="bf16", quantize_base="float8"
    )
    with pytest.raises(UserError, match="no other switch saves memory; use a smaller --resolution"):
        check_step(least, *adapted, CPU)


def test_switches_that_are_on_are_not_advised():
    plans = switches(CONFIG, torch.device("cuda"))
    assert plans[:4] == [
        (("gradient_checkpointing", True),),
        (("cpu_offload", True),),
        (("mixed_precision", "bf16"),),
        (("train_batch_size", 2), ("gradient_accumulation_steps", 2)),
    ]
    assert plans[5:7] == [(("offload_layers", True),), (("quantize_base", "float8"),)]
    assert len(plans) == 2 * 2 * 2 * 2 * 2 * 3 - 1
    assert {name for plan in switches(CONFIG, CPU) for name, _ in plan}.isdisjoint({"cpu_offload", "offload_layers"})
    on = replace(CONFIG, gradient_checkpointing=True, cpu_offload=True, mixed_precision="fp16", train_batch_size=1)
    assert switches(replace(on, offload_layers=True, quantize_base="float8"), torch.device("cuda")) == []


@pytest.mark.parametrize(
    ("changes", "bytes_a_number"),
    [({"quantize_base": "float8"}, 3), ({"offload_layers": True}, 4)],
    ids=["float8", "offloaded"],
)
def test_layers_that_no_adapter_uses_are_counted_as_they_are_stored(adapted, monkeypatch, changes, bytes_a_number):
    """What is saved of each number of four bytes, whether the model is stored like that already or not."""
    monkeypatch.setattr(preflight, "step_bytes", lambda *_, **__: 0)
    model, adapter = adapted
    gpu = torch.device("cuda")
    numbers = sum(layer.weight.numel() for layer in stored_layers(model.unet, True).values())
    plain, changed = needed_bytes(CONFIG, model, adapter, gpu), needed_bytes(replace(CONFIG, **changes), *adapted, gpu)
    assert plain - changed == numbers * bytes_a_number
    stored = copy.copy(model)
    stored.unet = copy.deepcopy(model.unet)
    store(stored.unet, True, float8="quantize_base" in changes, in_main_memory="offload_layers" in changes)
    assert needed_bytes(replace(CONFIG, **changes), stored, adapter, gpu) == changed


def test_offloading_takes_what_is_not_training_off_the_device(adapted):
    model, _ = adapted
    offloaded = replace(CONFIG, cpu_offload=True)
    saved = needed_bytes(CONFIG, *adapted, torch.device("cuda")) - needed_bytes(
        offloaded, *adapted, torch.device("cuda")
    )
    assert saved == sum(parameter.nbytes for parameter in model.vae.parameters())
    assert needed_bytes(offloaded, *adapted, CPU) == needed_bytes(CONFIG, *adapted, CPU)


def test_class_images_double_the_batch(adapted):
    with_prior = replace(CONFIG, with_prior_preservation=True, train_batch_size=2)
    assert needed_bytes(with_prior, *adapted, CPU) == needed_bytes(CONFIG, *adapted, CPU)


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedulefree"])
def test_the_optimizers_state_is_as_large_as_counted(adapted, name):
    _, adapter = adapted
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(replace(CONFIG, optimizer=name, learning_rate=1.0, text_encoder_lr=1.0), adapter)
    getattr(optimizer, "train", lambda: None)()
    optimizer.step()
    adapter.zero_grad()
    states = [state for by_parameter in optimizer.state.values() for state in by_parameter.values()]
    size = sum(state.nbytes for state in states if isinstance(state, torch.Tensor) and state.ndim > 0)
    assert size == OPTIMIZER_BYTES[name] * sum(parameter.numel() for parameter in adapter.parameters())


def test_what_cannot_be_estimated_is_not_refused(adapted, monkeypatch, caplog):
    model, _ = adapted

    def predict(*args, **options):
        raise RuntimeError("nothing is known of contents")

    monkeypatch.setattr(type(model), "predict", predict)
    with_free(monkeypatch, model, 0)
    with caplog.at_level(logging.WARNING):
        check_step(CONFIG, *adapted, CPU)
    assert "could not be estimated: nothing is known of contents" in caplog.text


@pytest.mark.parametrize("family", WRITERS, ids=lambda family: family.__name__)
def test_the_estimate_without_weights_is_that_of_the_loaded_model(family, tmp_path, monkeypatch):
    base = WRITERS[family](tmp_path / "base")
    monkeypatch.setattr(loading, "check_weights", lambda *_: pytest.fail("weights were looked at"))
    config = replace(CONFIG, pretrained_model_name_or_path=str(base))
    estimate = estimate_for(config, CPU)
    monkeypatch.undo()
    model = load_model(str(base))
    filled = with_model_defaults(config.resolved(), model)
    adapter = inject(filled.adapter, model.denoiser, model.text_encoders)
    assert estimate.needed() == needed_bytes(filled, model, adapter, CPU)
    assert all(parameter.is_meta for parameter in estimate.model.denoiser.parameters() if not parameter.requires_grad)


def test_a_plan_has_the_fewest_changes_that_fit(base):
    estimate = estimate_for(replace(CONFIG, pretrained_model_name_or_path=str(base)), torch.device("cuda"))
    assert estimate.plan(estimate.needed()).changes == ()
    one = estimate.plan(estimate.needed() - 1)
    assert len(one.changes) == 1
    assert one.needed == estimate.needed(one.changes) < estimate.needed()
    assert estimate.plan(1000) is None
    assert estimate.least().needed <= one.needed
