"""Which layers of an encoder with a head are adapted, which are trained as a whole, and which do nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from gsoft_diffusion.foundation.errors import UserError


@dataclass(frozen=True)
class Layers:
    """The parts of a model that has a head for classes or ratings, by their paths.

    encoder: linear layers to adapt. head: modules to train as a whole: all behind the encoder, and its pooler if the
    head reads it. dead: linear layers that the output does not depend on.
    """

    encoder: dict[str, nn.Linear]
    head: tuple[str, ...]
    dead: tuple[str, ...]


def find_layers(model: PreTrainedModel) -> Layers:
    """Look through a model of transformers, by a forward and a backward pass on a few tokens.

    model: such as `AutoModelForSequenceClassification` gives, all of it requiring gradients; is left as it is. Raises
    UserError if there is nothing to adapt or no head.
    """
    body = model.base_model_prefix
    heads = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    if not hasattr(model, body) or not heads:
        raise UserError(f"{type(model).__name__} is no encoder with a head for classes or ratings")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    reached = _reached(model)
    dead = tuple(path for path, module in linears.items() if module not in reached)
    pooler = f"{body}.pooler"
    encoder = {
        path: module
        for path, module in linears.items()
        if path.startswith(f"{body}.") and not _is_inside(path, pooler) and path not in dead
    }
    if any(_is_inside(path, pooler) and path not in dead for path in linears):
        heads.insert(0, pooler)
    if not encoder:
        raise UserError(f"{type(model).__name__} has no linear layers in its encoder")
    return Layers(encoder, tuple(heads), dead)


def _reached(model: PreTrainedModel) -> set[nn.Module]:
    """The linear layers that get a gradient from the output."""
    inputs = {name: tensor.to(model.device) for name, tensor in model.dummy_inputs.items()}
    model(**inputs).logits.sum().backward()
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    reached: set[nn.Module] = {linear for linear in linears if linear.weight.grad is not None}
    model.zero_grad()
    return reached


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")
