"""The module that a training step runs: base model and adapter together, from noisy latents to a prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsoft_diffusion.models.families import BaseModel, chosen, joined
from gsoft_diffusion.training.trainable import TrainableAdapter

PROMPTS_AT_ONCE = 8  # through a text encoder; the captions of a whole data set would not fit into a GPU's memory


class Predictor(nn.Module):
    """All that runs in a training step: the denoiser, the text encoders if they train, and the adapter in all of them.

    Prompts are known beforehand: what the adapter does not change is computed of them once, the rest in each batch.
    """

    def __init__(self, model: BaseModel, adapter: TrainableAdapter, prompts: Sequence[str]) -> None:
        """model: the base model, whose text encoders compute once for all prompts what stays the same.
        adapter: in the model already; its settings say whether the text encoders train.
        prompts: all that the run trains on; `forward` takes their numbers.
        """
        super().__init__()
        self.prompts = list(prompts)
        self.model = model  # no module: it says how those below work together
        self.network = model.denoiser
        self.text_encoders = nn.ModuleList(model.text_encoders if adapter.config.text_encoder else [])
        self.adapter = adapter
        with torch.no_grad(), model.on_device(*model.all_text_encoders()):
            encode = model.prepare if self.text_encoders else model.encode_prompts
            starts = range(0, len(prompts), PROMPTS_AT_ONCE)
            inputs = [encode(prompts[start : start + PROMPTS_AT_ONCE]) for start in starts]
        self.prompt_inputs = joined(inputs)  # each (prompts, …)

    def number_of(self, prompt: str) -> Tensor:
        """The place of one of the prompts among them, a scalar, as `forward` takes it. Raises ValueError for others."""
        return torch.tensor(self.prompts.index(prompt))

    def forward(
        self, noisy_latents: Tensor, timesteps: Tensor, prompts: Tensor, prompt_of: Tensor, views: Tensor
    ) -> Tensor:
        """The prediction (B, C, h, w) in float32, for the prompt and the view of each sample.

        noisy_latents: (B, C, h, w).
        timesteps: (B,).
        prompts: (K,), whole numbers: the prompts that are encoded, as places in the `prompts` that this was made with.
        prompt_of: (B,), whole numbers: the place among those K of each sample's. Both may be on the CPU.
        views: (B, 6), as `photos.crops.view` gives them.
        """
        encoded = chosen(self.prompt_inputs, prompts)
        if self.text_encoders:
            encoded = self.model.encode(encoded)
        return self.model.predict(noisy_latents, timesteps, chosen(encoded, prompt_of), views)
