"""Modules that are trained as a whole beside the rotations, such as a new head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gsoft.submodules import add_submodule


class SavedModules(nn.Module):
    """Holds a model's own modules under their paths, so that their numbers are the adapter's, and their old values.

    They are trained in their place in the model. Their parameters keep the dtype of the model.

    set_aside: whether they have the old values at present, inside of `as_before`.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """modules: by their paths in the model. Changes nothing in them."""
        super().__init__()
        self._originals: dict[str, Tensor] = {}
        self.set_aside = False
        for path, module in modules.items():
            add_submodule(self, path, module)

    def in_half_precision(self) -> list[str]:
        """Names of parameters that have so few digits that training may not change them."""
        short = (torch.float16, torch.bfloat16)
        return [name for name, parameter in self.named_parameters() if parameter.dtype in short]

    def start(self) -> None:
        """Keep the values that the modules have, and have them trained."""
        self._originals = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def stop(self) -> None:
        """Forget the old values, and have the modules trained no more. Without effect unless started."""
        if self._originals:
            self.requires_grad_(False)
            self._originals = {}

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the old values back. Without effect unless started."""
        state = self.state_dict()
        for name, value in self._originals.items():
            state[name].copy_(value)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Inside the block the modules have their old values, in tensors of their own.

        What is trained is not written to, so that a backward pass may go through it after the block.
        """
        trained: list[tuple[nn.Module, str, Tensor]] = []
        modules = dict(self.named_modules(remove_duplicate=False))
        before, self.set_aside = self.set_aside, bool(self._originals)  # it may be inside of another block
        try:
            for name, value in self._originals.items():
                path, _, attribute = name.rpartition(".")
                owner = modules[path]
                present = getattr(owner, attribute)
                old = value.to(present, copy=True)  # the model may have been moved or cast
                trained.append((owner, attribute, present))
                setattr(owner, attribute, nn.Parameter(old, False) if isinstance(present, nn.Parameter) else old)
            yield
        finally:
            for owner, attribute, present in trained:
                setattr(owner, attribute, present)
            self.set_aside = before
