"""Several adapters on one base model: each as strong as wanted, one after the other, switched without loading again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gsoft.adapter import Adapter
from gsoft.errors import GSOFTError
from gsoft.kept_weight import KeptWeight
from gsoft.linear_slice import AnyLinear
from gsoft.rotation import at_strength, check_strength
from gsoft.saving import AdapterFile, adapter_for, read


class Stack:
    """Adapters for the same models, of which any may be in use, merged into their weights:

        W' = A_n(… A_2(A_1(W)) …)        A_i(W) = s_i · Q_out,i W Q_in,i, each at its strength (see `at_strength`)

    Rotations do not commute, so the order counts: the first is nearest to the base model. Without scales the result has
    the singular values of `W`, however many there are. Adapters may differ in shape and in the layers they are on.

    Whatever is in use, the models are ordinary models with other weights, which cost what the base models cost. Weights
    are computed in float32 and rounded once, to the model's dtype.
    """

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._tensors: dict[str, Mapping[str, Tensor]] = {}  # of each adapter, at strength 1
        self._kept_weights: dict[str, KeptWeight] = defaultdict(KeptWeight)  # by layer
        self.strengths: dict[str, float] = {}  # of the adapters in use, in their order

    def add(self, name: str, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
        """Take in an adapter that is not attached.

        name: what `use` calls it. adapter: of the models that this stack is of. tensors: its parameters, at strength 1.
        Raises GSOFTError if the name is taken.
        """
        self.check_new(name)
        self._adapters[name], self._tensors[name] = adapter, tensors

    def check_new(self, name: str) -> None:
        """Raise GSOFTError if the name is taken."""
        if name in self._adapters:
            raise GSOFTError(f"{name}: an adapter of this name is loaded already")

    def use(self, strengths: Mapping[str, float]) -> None:
        """Use these adapters in this order, and no others: `{"dog": 1.0, "oil": 0.6}`; `{}` is the base model.

        Raises GSOFTError for a name that is not loaded and for a strength that is not a finite number.
        """
        self._check(strengths)
        linears = self.layers(self._adapters)
        for layer, kept in self._kept_weights.items():
            kept.restore(linears[layer])
        for layer, _, composed in self.composed(strengths):
            self._kept_weights[layer].replace(linears[layer], composed)
        self.strengths = dict(strengths)

    @torch.no_grad()
    def composed(self, strengths: Mapping[str, float]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every layer that these adapters change: its name, the base model's `W`, and `W'`, both in float32 or more.

        To be asked while no adapter is in use, and to be gone through before it is asked again: an adapter has one
        strength at a time. Raises GSOFTError as `use` does.
        """
        self._check(strengths)
        assert not any(kept.replaced for kept in self._kept_weights.values()), "W is not in its place"
        in_order = []
        for name, strength in strengths.items():
            self._adapters[name].load_state_dict(at_strength(self._tensors[name], strength))
            in_order.append({layer: rotated for layer, _, rotated in self._adapters[name].layers()})
        for layer, linear in self.layers(strengths).items():
            weight = base = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
            for rotated in in_order:
                if layer in rotated:
                    rotated[layer].rotation.to(weight.device)  # the models may have been moved
                    weight = rotated[layer].rotated_weight(weight)
            yield layer, base, weight

    def layers(self, names: Iterable[str]) -> dict[str, AnyLinear]:
        """The models' layers, or slices of them, that any of these adapters is on."""
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
            if name not in self._adapters:
                raise GSOFTError(
                    f"{name}: no adapter of this name is loaded; there are {', '.join(self._adapters) or 'none'}"
                )
            check_strength(strength, name)


class AdapterStack(Stack):
    """A stack of adapters of any one model, read from files that `gsoft.save` wrote."""

    def __init__(self, model: nn.Module) -> None:
        """model: a plain one, without an adapter of its own; `use` merges adapters into its weights."""
        super().__init__()
        self._model = model

    def load(self, name: str, path: str | Path, *, accept_other_base: bool = False) -> AdapterFile:
        """Read an adapter, to be used by this name.

        name: what `use` calls it. path: the file. accept_other_base: as in `gsoft.load`.

        Returns what the file says. Raises GSOFTError as in `gsoft.load`, if
        the name is taken, or if the adapter has modules of its own (`modules_to_save`), of which only one can be in the
        model.
        """
        self.check_new(name)
        file = read(path)
        if file.config.modules_to_save:
            raise GSOFTError(
                f"{file.path}: trains whole modules ({', '.join(file.config.modules_to_save)}), "
                "which a stack cannot compose; load it by itself (gsoft.load)"
            )
        with self.disabled():
            self.add(name, adapter_for(file, self._model, accept_other_base=accept_other_base), file.tensors)
        return file
