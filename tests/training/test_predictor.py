"""Base model and adapter together."""

from __future__ import annotations

import pytest
import torch

from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.families import whole_view
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training.predictor import Predictor


@pytest.mark.parametrize("text_encoder", [True, False])
def test_prompt_embeddings_are_those_of_the_prompts(config, text_encoder):
    model = load_model(config.pretrained_model_name_or_path)
    expected = model.encode_prompts(["a dog", "a cat"])["encoder_hidden_states"]
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=text_encoder), model.unet, [model.text_encoder])
    denoiser = Predictor(model, adapter, ["a dog", "a cat"])
    latents, timesteps = torch.randn(3, 4, 16, 16), torch.tensor([1, 2, 3])
    views = whole_view(32, 32).repeat(3, 1)
    prediction = denoiser(latents, timesteps, torch.tensor([1, 0]), torch.tensor([0, 1, 0]), views)
    wanted = model.unet(latents, timesteps, encoder_hidden_states=expected[[1, 0, 1]]).sample
    torch.testing.assert_close(prediction, wanted)
    trained = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert trained == {f"adapter.{name}" for name, _ in adapter.named_parameters()}


@pytest.mark.parametrize("text_encoder", [True, False])
def test_many_prompts_are_encoded_a_few_at_a_time(config, text_encoder, monkeypatch):
    """All captions of a data set at once would not fit into a GPU's memory."""
    model, prompts = load_model(config.pretrained_model_name_or_path), [f"dog number {n}" for n in range(19)]
    whole = model.prepare(prompts) if text_encoder else model.encode_prompts(prompts)
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=text_encoder), model.unet, [model.text_encoder])
    sizes, prepare = [], model.prepare
    monkeypatch.setattr(model, "prepare", lambda some: sizes.append(len(some)) or prepare(some))
    predictor = Predictor(model, adapter, prompts)
    assert sizes == [8, 8, 3]
    torch.testing.assert_close(predictor.prompt_inputs, whole)
