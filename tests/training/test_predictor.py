"""Base model and adapter together."""

from __future__ import annotations

import pytest
import torch

from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.families import whole_view
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training.predictor import Predictor


@pytest.mark.parametrize("text_encoder", [True, False])
def test_prompt_embeddings_are_those_of_the_prompts(config, text_encoder):
    from gsoft_diffusion.adapters.injection import inject

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
