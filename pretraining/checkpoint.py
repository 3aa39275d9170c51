"""Resumable state of the pretraining scripts: written beside and renamed, so that a killed run loses little."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Checkpoint:
    """Saves and restores named objects that have `state_dict`, with the number of images seen."""

    def __init__(self, path: Path, every_seconds: float = 180, **parts: Any) -> None:
        self.path, self.every, self.parts, self._last = path, every_seconds, parts, time.monotonic()

    def restore(self) -> int:
        """Load the file if it exists; returns the images seen so far."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return int(state["images"])

    def save(self, images: int) -> None:
        beside = self.path.with_suffix(".tmp")
        torch.save({"images": images, **{name: part.state_dict() for name, part in self.parts.items()}}, beside)
        beside.replace(self.path)
        self._last = time.monotonic()

    def save_when_due(self, images: int) -> bool:
        """Save if the last save is `every_seconds` ago; says whether it did."""
        due = time.monotonic() - self._last > self.every
        if due:
            self.save(images)
        return due


class Average(nn.Module):
    """Exponential moving average of a model's weights, `decay` of the old at every update (less while it is young)."""

    updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))  # on the CPU: no step waits to read it
        self.values = nn.ParameterList(p.detach().clone().requires_grad_(False) for p in model.parameters())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        n = int(self.updates)
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(self.values), list(model.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for target, value in zip(model.parameters(), self.values, strict=True):
            target.copy_(value)
