"""Modules that are trained as a whole beside the rotations, such as a new head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gsoft.submodules import add_submodule


class SavedModules(nn.Module):
    """Holds a model's own modules under their paths, so that their numbers are the adapter's, and their old values.

    They are trained in their place in the model. Their parameters keep the dtype of the model.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """modules: by their paths in the model. Changes nothing in them."""
        super().__init__()
        self._originals: dict[str, Tensor] = {}
        for path, module in modules.items():
            add_submodule(self, path, module)

    def start(self) -> None:
        """Keep the values that the modules have, and have them trained."""
        self._originals = self._copy()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def stop(self) -> None:
        """Put the old values back, and have the modules trained no more. Without effect unless started."""
        if self._originals:
            self.exchange()
            self.requires_grad_(False)
            self._originals = {}

    @torch.no_grad()
    def exchange(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Put other values into the modules, by default those from before `start`. Returns those that were there."""
        present, state = self._copy(), self.state_dict()
        for name, value in (self._originals if values is None else values).items():
            state[name].copy_(value)
        return present

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
