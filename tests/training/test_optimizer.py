"""Optimizers and precision."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from training_runs import weights

from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training.optimizer import make_optimizer
from gsoft_diffusion.training.preparation import with_model_defaults
from gsoft_diffusion.training.train import train


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"optimizer": "schedulefree", "lr_warmup_steps": 2},
        {"optimizer": "adamw", "lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"optimizer": "adamw", "snr_gamma": 5.0, "offset_noise": 0.1, "max_grad_norm": 0.0},
        {"mixed_precision": "bf16"},
        {"adapter": AdapterConfig(block_size=2, double=False, output_scale=False, parametrization="exp")},
        {"attention_backend": "native"},
        {"center_crop": True, "random_flip": True, "resolution": 36},
        {"train_batch_size": 7},
        {"mixed_precision": "fp16"},
    ],
    ids=str,
)
def test_settings_that_train(config, changes):
    if (library := {"prodigy": "prodigyopt", "schedulefree": "schedulefree"}.get(changes.get("optimizer"))) is not None:
        pytest.importorskip(library)
    tensors = weights(replace(config, **changes))
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert max(tensor.abs().max() for tensor in tensors.values()) > 0


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")],
)
def test_a_missing_library_is_named(config, monkeypatch, optimizer, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(UserError, match=f"--optimizer {optimizer}.*pip install {package}"):
        train(replace(config, optimizer=optimizer, learning_rate=1.0))


def test_weight_decay_leaves_scales_alone(config):
    model = load_model(config.pretrained_model_name_or_path)
    adapter = inject(config.adapter, model.unet, [model.text_encoder])
    optimizer = make_optimizer(replace(config, adam_weight_decay=0.5), adapter)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(adapter.parameters()))
    for name, parameter in adapter.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("output_scale") else 0.5)


@pytest.mark.parametrize(
    ("given", "optimizer", "expected"),
    [(None, "adamw", 4e-6), (0.25, "adamw", 0.25), (None, "prodigy", 1.0)],
)
def test_text_encoders_have_a_learning_rate_of_their_own(config, given, optimizer, expected):
    pytest.importorskip("prodigyopt")
    model = load_model(config.pretrained_model_name_or_path)
    config = replace(config, learning_rate=1.0, text_encoder_lr=given, optimizer=optimizer)
    config = with_model_defaults(config, model)
    adapter = inject(config.adapter, model.unet, [model.text_encoder])
    made = make_optimizer(config, adapter)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    for name, parameter in adapter.named_parameters():
        assert rates[id(parameter)] == (expected if name.startswith("text_encoder") else 1.0)
