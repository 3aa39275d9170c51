"""The exact weight of a layer that has another in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from gsoft.linear_slice import AnyLinear


class KeptWeight:
    """Keeps `W` in main memory while `W'` is written over it, and puts it back bit for bit."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    @property
    def replaced(self) -> bool:
        """Whether another weight is in the place of `W`."""
        return self._weight is not None

    def keep(self, layer: AnyLinear) -> None:
        """Keep the layer's weight, which is about to be replaced."""
        self._weight = layer.weight.detach().to("cpu", copy=True)

    @torch.no_grad()
    def replace(self, layer: AnyLinear, weight: Tensor) -> None:
        """Keep the layer's weight and write another in its place.

        layer: whose weight is replaced. weight: of the same shape and any dtype, to be rounded to the layer's.
        """
        self.keep(layer)
        layer.weight.copy_(weight)

    def forget(self) -> None:
        """Keep `W` no longer: what is in its place stays."""
        self._weight = None

    @torch.no_grad()
    def restore(self, layer: AnyLinear) -> None:
        """Put `W` back, if another is in its place."""
        if self._weight is not None:
            layer.weight.copy_(self._weight)
            self._weight = None
