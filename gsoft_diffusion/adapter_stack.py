"""Several adapters on one base model: each as strong as wanted, one after the other, switched without loading again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gsoft_diffusion.adapter_file import AdapterFile, check_base, read_adapter
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.injection import Adapter
from gsoft_diffusion.projection import at_strength


class AdapterStack:
    """Adapters for one base model, of which any may be in use, merged into its weights:

        W' = A_n(… A_2(A_1(W)) …)        A_i(W) = s_i · Q_out,i W Q_in,i, each at its strength (see `at_strength`)

    Rotations do not commute, so the order counts: the first is nearest to the base model. Without scales the result has
    the singular values of `W`, however many there are. Adapters may differ in shape and in the layers they are on.

    Whatever is in use, the models are ordinary models with other weights, which cost what the base models cost. Weights
    are computed in float32 and rounded once, to the model's dtype.
    """

    def __init__(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> None:
        self._models = (denoiser, text_encoders)
        self._files: dict[str, AdapterFile] = {}
        self._adapters: dict[str, Adapter] = {}
        self._base_weights: dict[str, Tensor] = {}  # the exact ones of the layers that have others in their place
        self.strengths: dict[str, float] = {}  # of the adapters in use, in their order

    def load(self, name: str, path: str | Path) -> AdapterFile:
        """Read an adapter, to be used by this name. UserError as in `load_adapter`, or if the name is taken."""
        if name in self._files:
            raise UserError(f"{name}: an adapter of this name is loaded already")
        file = read_adapter(path)
        with self.disabled():
            check_base(file, *self._models)
        self._files[name], self._adapters[name] = file, Adapter(file.config, *self._models)
        return file

    def use(self, strengths: Mapping[str, float]) -> None:
        """Use these adapters in this order, and no others: `{"dog": 1.0, "oil": 0.6}`; `{}` is the base model.

        Raises UserError for a name that is not loaded and for a strength that is not a finite number.
        """
        self._check(strengths)
        self._restore()
        with torch.no_grad():
            for layer, weight, composed in self.composed(strengths):
                self._base_weights[layer] = weight.detach().clone()
                weight.copy_(composed)
        self.strengths = dict(strengths)

    @torch.no_grad()
    def composed(self, strengths: Mapping[str, float]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every layer that these adapters change: its name, the base model's `W`, and `W'` in float32 or more.

        To be asked while no adapter is in use.
        """
        self._check(strengths)
        assert not self._base_weights, "W is not in its place"
        projections = []
        for name, strength in strengths.items():
            self._adapters[name].load_state_dict(at_strength(self._files[name].tensors, strength))
            projections.append({layer: projection for layer, _, projection in self._adapters[name].layers()})
        for layer, linear in self.layers(strengths).items():
            weight = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
            for own in projections:
                if layer in own:
                    weight = own[layer].rotated_weight(weight)
            yield layer, linear.weight, weight

    def layers(self, names: Iterable[str]) -> dict[str, nn.Linear]:
        """The model's layers that any of these adapters is on."""
        return {layer: linear for name in names for layer, linear, _ in self._adapters[name].layers()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the models are the untouched base models."""
        strengths = self.strengths
        self.use({})
        try:
            yield
        finally:
            self.use(strengths)

    def _check(self, strengths: Mapping[str, float]) -> None:
        for name, strength in strengths.items():
            if name not in self._files:
                raise UserError(
                    f"{name}: no adapter of this name is loaded; there are {', '.join(self._files) or 'none'}"
                )
            if not math.isfinite(strength):
                raise UserError(f"{name}: its strength {strength} is not a number")

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the base models' weights back, bit for bit."""
        linears = self.layers(self._adapters)
        for layer, weight in self._base_weights.items():
            linears[layer].weight.copy_(weight)
        self._base_weights = {}
