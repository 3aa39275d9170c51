"""The class by which ComfyUI's own LoRA loaders read adapters of gsoft-diffusion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import comfy.weight_adapter
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from .rotation import Blocks, Layer, check_shape, find_layer, layer_blocks, rotated_outputs, rotated_weight


class GSOFTAdapter(WeightAdapterBase):
    """The rotation of one linear layer, as ComfyUI's loaders ask for it; signatures are theirs.

    loaded_keys: the file's keys that this layer uses. weights: a `Layer`'s fields, for ComfyUI, which moves them.
    """

    name = "gsoft"

    def __init__(self, loaded_keys: set[str], weights: Sequence[Any]) -> None:
        """Also called by ComfyUI itself, with copies of the tensors on another device: reads no values."""
        self.loaded_keys, self.weights = loaded_keys, weights
        self._layer = Layer(*weights)  # `weights` may be replaced by roundings to the model's dtype
        self._blocks: tuple[tuple[Any, ...], Blocks] | None = None

    @classmethod
    def load(
        cls,
        x: str,
        lora: Mapping[str, Tensor],
        alpha: float | None = None,
        dora_scale: Tensor | None = None,
        loaded_keys: set[str] | None = None,
    ) -> GSOFTAdapter | None:
        """The adapter of the layer that ComfyUI calls x, None if the file has none; adds to `loaded_keys`."""
        try:
            found = find_layer(x, lora)
        except ValueError as error:
            _say_once(str(error))
            return None
        if found is None:
            return None
        layer, keys = found
        if loaded_keys is not None:
            loaded_keys.update(keys)
        return cls(keys, tuple(layer))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """Turn the weight, in place: a part of a fused matrix comes as a view, and what is returned is not used then.

        ComfyUI has multiplied by `strength_model` and cut out `offset` already. On errors the weight stays, and they
        are logged; but ComfyUI itself must know if the GPU's memory is full.
        """
        try:
            rotated = rotated_weight(weight, self._layer, strength)
            changed = function(rotated)
            if changed is rotated:
                weight.copy_(rotated)
            else:  # it moves what is added to another place of the weight
                weight.add_(function(rotated - weight.float()))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            logging.error("gsoft: %s stays as it is: %s", key, error)
        return weight

    def bypass_forward(self, org_forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer with the turned weight makes of x, where ComfyUI leaves the weight alone (2026 and later).

        Its strength is in `self.multiplier`. A layer that does not fit, or cannot be computed, stays as it is, which is
        logged once.
        """

        def forward(rows: Tensor) -> Tensor:
            return org_forward(rows, *args, **kwargs)

        state = (self.multiplier, x.device)
        if self._blocks is None or self._blocks[0] != state:
            outputs = forward(x.new_zeros(1, x.shape[-1])).shape[-1]
            try:
                check_shape(self._layer, (outputs, x.shape[-1]))
                self._blocks = state, layer_blocks(self._layer, *state)
            except ValueError as error:
                (layer,) = (key.removesuffix(".q_in") for key in self.loaded_keys if key.endswith(".q_in"))
                _say_once(f"{layer} stays as it is: {error}")
                return forward(x)
        return rotated_outputs(forward, x, self._blocks[1], self._layer.first_columns)


def register() -> None:
    """Have ComfyUI's LoRA loaders try this class as well; once, however often the pack is loaded."""
    adapters = comfy.weight_adapter.adapters
    if not any(known.__name__ == GSOFTAdapter.__name__ for known in adapters):
        adapters.append(GSOFTAdapter)


@cache
def _say_once(message: str) -> None:
    """Loaders ask for hundreds of layers."""
    logging.error("gsoft: %s", message)
