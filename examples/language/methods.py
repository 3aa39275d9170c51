"""The methods, all on the same layers and, but for dense `Q` and full fine-tuning, with nearly as many learned numbers.

A skew-symmetric block has `b(b−1)/2` free numbers. The paper counts the `b²` that its code stores: GSOFT with blocks of
8 in two factors counts as LoRA with rank 8 there, and learns as much as LoRA with rank 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import gsoft
from eval.baselines import BaselineConfig, baseline_count, inject_peft
from examples.language.layers import find_layers

METHODS = {  # name in tables
    "full": "full fine-tuning",
    "lora": "LoRA, r 4",
    "oft": "OFT, b 16",
    "boft": "BOFT, b 8, m 2",
    "gsoft": "GSOFT, b 8, m 2",
    "double_gsoft": "Double GSOFT, b 3, m 4, no scale",
    "gsoft_dense": "GSOFT, b 8, dense Q",
}
ROTATIONS: dict[str, dict[str, Any]] = {
    "gsoft": {"double": False, "block_size": 8, "nfactors": 2},
    "double_gsoft": {"double": True, "block_size": 3, "nfactors": 4, "output_scale": False},
    "gsoft_dense": {"double": False, "block_size": 8, "nfactors": "dense"},
}
BASELINES = {  # of PEFT
    "lora": BaselineConfig("lora", rank=4),
    "oft": BaselineConfig("oft", block_size=16),
    "boft": BaselineConfig("boft", block_size=8, nfactors=2),
}


class Adapted(nn.Module):
    """A model with a method on its encoder, and its head to train.

    adapter: GSOFT's, which holds the head as well; None for other methods. learned: how many numbers the method learns,
    without the head. published: the same as the paper counts it, for GSOFT. dead: layers that were left out because the
    output does not depend on them.
    """

    accepts_loss_kwargs = False  # for the Trainer: the model takes the mean over a batch itself

    def __init__(self, model: PreTrainedModel, method: str) -> None:
        """Freezes the model and puts the method on it; outputs stay as they are until something is trained.

        model: an encoder with a head. method: a key of `METHODS`. Raises UserError or GSOFTError if it does not fit.
        """
        super().__init__()
        layers = find_layers(model)
        self.model, self.config, self.dead = model, model.config, layers.dead
        self.adapter: gsoft.ModelAdapter | None = None
        self.published: int | None = None
        if method in ROTATIONS:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Q is not dense")  # nor is it meant to be, of the paper's two factors
                self.adapter = gsoft.inject(model, rotation_config(method, layers.encoder, layers.head))
            self.learned, self.published = self.adapter.parameter_counts()["rotations"], published_count(self.adapter)
            return
        head = [model.get_submodule(path) for path in layers.head]
        if method == "full":
            self.learned = _size(model) - sum(map(_size, head))
            return
        config = BASELINES[method]
        widths = [(layer.in_features, layer.out_features) for layer in layers.encoder.values()]
        self.learned = sum(baseline_count(config, *pair) for pair in widths)
        inject_peft(config, model, list(layers.encoder))
        for module in head:
            module.requires_grad_(True)

    def forward(self, labels: Any = None, **inputs: Any) -> SequenceClassifierOutput:
        """What the model makes of a batch, with the loss if there are labels. The names are those of transformers."""
        return self.model(labels=labels, **inputs)


def rotation_config(method: str, encoder: Iterable[str], head: Iterable[str]) -> gsoft.Config:
    """The library's settings for a method.

    method: a key of `ROTATIONS`. encoder: paths of the layers to rotate. head: of the modules to train as a whole.
    """
    return gsoft.Config(
        target_modules=list(encoder),
        modules_to_save=list(head),
        parametrization="cayley",  # learned numbers are not scaled, so that learning rates are as in the paper
        **ROTATIONS[method],
    )


def published_count(adapter: gsoft.ModelAdapter) -> int:
    """How many numbers the paper counts for an adapter: whole blocks `b×b`, which its code stores, and the scales."""
    count = 0
    for name, parameter in adapter.named_parameters():
        if name.endswith(("q_in", "q_out")):
            nfactors, nblocks, free = parameter.shape
            size = (1 + math.isqrt(1 + 8 * free)) // 2  # of a block with b(b−1)/2 free numbers
            count += nfactors * nblocks * size * size
        elif name.endswith("output_scale"):
            count += parameter.numel()
    return count


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
