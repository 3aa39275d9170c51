"""A whole model on its way out: rounded to one precision, and written as a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from gsoft.linear_slice import AnyLinear, whole_of
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import INDEX
from gsoft_diffusion.models.original_layout import text_encoder_tensors
from gsoft_diffusion.publish.tensor_files import rounded


def with_room_for(layers: Iterable[AnyLinear], precision: torch.dtype) -> None:
    """Cast layers up that have fewer digits than a precision: what is merged into them is to be rounded to that once.

    layers: of a model, or slices of them; changed in place. precision: of the weights to be written.
    """
    for layer in layers:
        whole_of(layer).to(torch.promote_types(layer.weight.dtype, precision))


def round_weights(model: BaseModel, dtype: torch.dtype) -> None:
    """Round all weights to one precision.

    model: its networks are cast in place, so that no second model is in memory. dtype: of all floating-point weights.
    Raises UserError if a weight is too large for it.
    """
    for name in model.parts():
        network = getattr(model, name)
        if not isinstance(network, nn.Module):
            continue
        for weight, tensor in network.state_dict().items():
            rounded(weight, tensor, dtype)  # refuses what does not fit
        nn.Module.to(network, dtype)  # diffusers' own warns of layers that it would keep in float32, and names none


def write_folder(folder: Path, model: BaseModel) -> None:
    """Write a complete diffusers folder.

    folder: is made. model: its weights are written as they are.
    """
    index: dict[str, object] = {
        "_class_name": model.pipeline,
        "_diffusers_version": diffusers.__version__,
    }
    index |= model.index_values | model.index
    for name in model.parts():
        part = getattr(model, name)
        if isinstance(part, CLIPTextModel | CLIPTextModelWithProjection):
            save_text_encoder(part, folder / name)
        else:
            part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        if isinstance(part, CLIPTokenizer):
            # vocab.json and merges.txt: transformers 5 leaves them out, other readers ask for them
            part.backend_tokenizer.model.save(str(folder / name))
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_text_encoder(text_encoder: CLIPTextModel | CLIPTextModelWithProjection, folder: Path) -> None:
    """Write a text encoder with its weights under the names of `text_encoder_tensors`.

    text_encoder: is not changed. folder: is made.

    transformers itself uses these names only where the model was read from files that had them.
    """
    tensors = text_encoder_tensors(text_encoder)
    text_encoder.save_pretrained(folder, state_dict=tensors, save_original_format=False)
