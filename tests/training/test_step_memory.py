from __future__ import annotations

import gc

import pytest
import torch
from conftest import PIXELS
from tiny_families import WRITERS

from eval.baselines import BaselineConfig, inject_baseline
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.loading import load_models
from gsoft_diffusion.training.step_memory import step_bytes

BATCH = 4


def saved_bytes(models, adapter, trains_text: bool) -> int:
    """What a real forward pass keeps for the backward pass: each storage once, parameters not at all."""
    networks = (models.denoiser, *models.readers(), adapter)
    there = {t.untyped_storage().data_ptr() for n in networks for t in (*n.parameters(), *n.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            saved[storage.data_ptr()] = storage  # kept, so that no other gets its place
        return tensor

    with torch.no_grad():
        prepared = models.prepare(["a"])
    models.denoiser.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.set_grad_enabled(trains_text):
            prompts = models.encode(prepared)
        conditioning = {name: tensor[torch.zeros(BATCH, dtype=torch.long)] for name, tensor in prompts.items()}
        latents = torch.zeros(BATCH, *models.latent_shape(models.resolution))
        loss = models.predict(latents, torch.zeros(BATCH), conditioning, torch.zeros(BATCH, 6)).square().mean()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("family", WRITERS, ids=lambda family: family.__name__)
def test_every_familys_step_is_counted_without_running_it(family, tmp_path):
    """At least what a real step saves, and not much more: the rest are the adapter's blocks and passing gradients."""
    models = load_models(str(WRITERS[family](tmp_path / "base")))
    trains_text = bool(models.text_encoders)
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=trains_text), models.denoiser, models.text_encoders)
    shape = models.latent_shape(models.resolution)
    estimated = step_bytes(models, adapter, BATCH, shape, trains_text=trains_text)
    saved = saved_bytes(models, adapter, trains_text)
    assert saved < estimated < 1.5 * saved
    checkpointed = step_bytes(models, adapter, BATCH, shape, trains_text=trains_text, gradient_checkpointing=True)
    assert checkpointed < estimated
    assert not any(parameter.grad is not None for parameter in adapter.parameters())
    assert not models.denoiser.is_gradient_checkpointing


def test_it_grows_with_batch_size_type_and_what_trains(base):
    models = load_models(str(base))
    adapter = inject(AdapterConfig(nblocks=4), models.denoiser, models.text_encoders)
    shape = models.latent_shape(PIXELS)

    def estimate(batch_size: int = 8, **options) -> int:
        return step_bytes(models, adapter, batch_size, shape, **{"trains_text": True} | options)

    assert estimate() == estimate()  # nothing is left behind
    assert 1.7 * estimate(4) < estimate() < 2 * estimate(4)
    assert 0.4 * estimate() < estimate(dtype=torch.bfloat16) < 0.7 * estimate()
    assert estimate(trains_text=False) < estimate()


def test_other_methods_are_counted_as_well(base):
    models = load_models(str(base))
    for config in (BaselineConfig("lora", rank=2), BaselineConfig("full")):
        adapter = inject_baseline(config, models.denoiser, models.text_encoders)
        estimated = step_bytes(models, adapter, BATCH, models.latent_shape(PIXELS), trains_text=True)
        saved = saved_bytes(models, adapter, True)
        assert saved < estimated < 1.5 * saved
        adapter.remove()
        gc.collect()
