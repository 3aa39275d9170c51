from __future__ import annotations

import gc

import pytest
import torch
from conftest import PIXELS
from tiny_families import WRITERS

from eval.baselines import BaselineConfig, inject_baseline
from gsoft.costs import CPU, GPU, device_costs, weights_at_once
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.frozen_storage import store, stored_layers
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training.step_memory import step_bytes

BATCH = 4


def saved_bytes(model, adapter, trains_text: bool) -> int:
    """What a real forward pass keeps for the backward pass: each storage once, parameters not at all."""
    networks = (model.denoiser, *model.all_text_encoders(), adapter)
    there = {t.untyped_storage().data_ptr() for n in networks for t in (*n.parameters(), *n.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            saved[storage.data_ptr()] = storage  # kept, so that no other gets its place
        return tensor

    with torch.no_grad():
        prepared = model.prepare(["a"])
    model.denoiser.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.set_grad_enabled(trains_text):
            prompts = model.encode(prepared)
        conditioning = {name: tensor[torch.zeros(BATCH, dtype=torch.long)] for name, tensor in prompts.items()}
        latents = torch.zeros(BATCH, *model.latent_shape(model.resolution))
        loss = model.predict(latents, torch.zeros(BATCH), conditioning, torch.zeros(BATCH, 6)).square().mean()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("family", WRITERS, ids=lambda family: family.__name__)
def test_every_familys_step_is_counted_without_running_it(family, tmp_path):
    """At least what a real step saves, and not much more: the rest are the adapter's blocks and passing gradients."""
    model = load_model(str(WRITERS[family](tmp_path / "base")))
    trains_text = bool(model.text_encoders)
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=trains_text), model.denoiser, model.text_encoders)
    shape = model.latent_shape(model.resolution)
    estimated = step_bytes(model, adapter, BATCH, shape, trains_text=trains_text)
    saved = saved_bytes(model, adapter, trains_text)
    assert saved < estimated < 1.5 * saved
    checkpointed = step_bytes(model, adapter, BATCH, shape, trains_text=trains_text, gradient_checkpointing=True)
    assert checkpointed < estimated
    assert not any(parameter.grad is not None for parameter in adapter.parameters())
    assert not model.denoiser.is_gradient_checkpointing


def test_it_grows_with_batch_size_type_and_what_trains(base):
    model = load_model(str(base))
    adapter = inject(AdapterConfig(nblocks=4), model.denoiser, model.text_encoders)
    shape = model.latent_shape(PIXELS)

    def estimate(batch_size: int = 8, **options) -> int:
        return step_bytes(model, adapter, batch_size, shape, **{"trains_text": True} | options)

    assert estimate() == estimate()  # nothing is left behind
    assert 1.7 * estimate(4) < estimate() < 2 * estimate(4)
    assert 0.4 * estimate() < estimate(dtype=torch.bfloat16) < 0.7 * estimate()
    assert estimate(trains_text=False) < estimate()


@pytest.mark.parametrize("in_main_memory", [False, True])
def test_layers_in_eight_bits_are_counted_with_what_they_are_fetched_into(base, in_main_memory):
    """One at a time, and wherever they are stored."""
    model = load_model(str(base))
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), model.denoiser)
    shape = model.latent_shape(PIXELS)
    plain = step_bytes(model, adapter, BATCH, shape, trains_text=False)
    sizes = [layer.weight.nbytes for layer in stored_layers(model.denoiser, True).values()]
    store(model.denoiser, True, float8=True, in_main_memory=in_main_memory)
    found = step_bytes(model, adapter, BATCH, shape, trains_text=False)
    assert plain <= found < plain + 3 * max(sizes) < plain + sum(sizes)


def test_other_methods_are_counted_as_well(base):
    model = load_model(str(base))
    for config in (BaselineConfig("lora", rank=2), BaselineConfig("full")):
        adapter = inject_baseline(config, model.denoiser, model.text_encoders)
        estimated = step_bytes(model, adapter, BATCH, model.latent_shape(PIXELS), trains_text=True)
        saved = saved_bytes(model, adapter, True)
        assert saved < estimated < 1.5 * saved
        adapter.remove()
        gc.collect()


@pytest.mark.parametrize(("device", "costs"), [("cpu", CPU), ("cuda", GPU)])
def test_layers_choose_their_side_for_the_device_of_the_step(base, monkeypatch, device, costs):
    asked = []

    def watched(weight):
        asked.append(device_costs(weight.device))
        return weights_at_once(weight)

    monkeypatch.setattr("gsoft.cache.weights_at_once", watched)
    model = load_model(str(base))
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), model.denoiser)
    shape = model.latent_shape(model.resolution)
    assert step_bytes(model, adapter, BATCH, shape, trains_text=False, device=torch.device(device)) > 0
    assert set(asked) == {costs}
    assert device_costs(torch.device("cpu")) == CPU  # afterwards
