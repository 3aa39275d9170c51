"""Everything that is learned for some layers of one or more models, and the switches that act on all of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gsoft.cache import RotationCache
from gsoft.config import RotationConfig
from gsoft.costs import KEPT_WEIGHT_BYTES
from gsoft.errors import GSOFTError
from gsoft.fused import RotatedSlices
from gsoft.linear import RotatedLayer, RotatedLinear, put_on, take_off
from gsoft.linear_slice import AnyLinear, LinearSlice, whole_of
from gsoft.rotation import Rotation, parameter_count
from gsoft.submodules import add_submodule

_ADAPTERS: WeakSet[Adapter] = WeakSet()  # all that there are, so that no two are on one model


class Adapter(nn.Module):
    """The rotations of some linear layers.

    Parameters are float32 and named after the layers: `<layer>.q_in`, `<layer>.q_out`, `<layer>.output_scale`.

    The adapter stands beside the models, not inside them: `model.state_dict()` and `model.to(dtype)` see only the base
    model. So it is moved to another device by itself, `adapter.to(device)` (or merged first), and whatever module runs
    the training step must hold it as a submodule.
    """

    def __init__(self, config: RotationConfig, linears: Mapping[str, AnyLinear], models: Sequence[nn.Module]) -> None:
        """Looks at the models without changing them; `attach` puts the adapter to work.

        linears: the layers to rotate, or slices of them, by name; the first component of a name tells the model.
        models: all of them. Raises GSOFTError if a width does not fit the configuration, naming layer, width and valid
        values.
        """
        super().__init__()
        self.config = config
        self._models, self._linears = tuple(models), dict(linears)  # which keep the base models out of the submodules
        self._rotated: dict[str, RotatedLayer] = {}
        for name, linear in linears.items():
            device = linear.weight.device
            rotation = Rotation(config, linear.in_features, linear.out_features, layer=name, device=device)
            add_submodule(self, name, rotation)
            self._rotated[name] = RotatedLayer(rotation)
        self._attached = self._unloaded = False
        self._required_grad: list[nn.Parameter] = []
        self._preparing: list[RemovableHandle] = []  # hooks
        _ADAPTERS.add(self)

    def attach(self) -> None:
        """Freeze the models and rotate their layers; until something is learned, outputs stay bit-equal.

        Raises GSOFTError if it is attached already, or another adapter is on a model: either would freeze and thaw what
        is the other's.
        """
        if self._attached:
            raise GSOFTError("attach(): the adapter is on its models already")
        own = set(self._base_parameters())
        if any(not own.isdisjoint(other._base_parameters()) for other in _ADAPTERS if other._attached):
            raise GSOFTError(
                "attach(): the model carries a GSOFT adapter already: remove it first (adapter.remove()), or merge it "
                "for good (adapter.merge_and_unload())"
            )
        self._attached, self._unloaded = True, False
        self._required_grad = [parameter for parameter in self._base_parameters() if parameter.requires_grad]
        for model in self._models:
            model.requires_grad_(False)
        slices: dict[nn.Linear, list[tuple[LinearSlice, RotatedLayer]]] = defaultdict(list)
        for name in self.self_rotating():
            linear, rotated = self._linears[name], self._rotated[name]
            if isinstance(linear, LinearSlice):
                slices[linear.whole].append((linear, rotated))
            else:
                put_on(linear, rotated)
        for whole, parts in slices.items():
            put_on(whole, RotatedSlices(parts))
        self._share_caches()
        for model in self._models:
            modules = set(model.modules())
            names = [name for name, linear in self._linears.items() if whole_of(linear) in modules]
            self._preparing.append(model.register_forward_pre_hook(partial(self._prepare, names)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which is on copies of the models."""
        super().__setstate__(state)
        _ADAPTERS.add(self)

    def _base_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for model in self._models for parameter in model.parameters())

    @torch.compiler.disable
    def _prepare(self, names: Sequence[str], model: nn.Module, inputs: Any) -> None:
        """Before a model computes: make its layers' rotated weights, so that its compiled graph has them whole."""
        for name in names:
            self._rotated[name].prepared = None  # all of the last pass, before there are new ones
        for name in names:
            self._rotated[name].prepare(self._linears[name])

    def self_rotating(self) -> Iterable[str]:
        """Layers that rotate themselves when the model calls them: all, unless a subclass computes with some."""
        return self._linears

    def _share_caches(self) -> None:
        """Let equal-shaped layers of a model on one device share a cache."""
        within = self._within_bound()
        groups: dict[tuple[bool, object], list[str]] = defaultdict(list)
        for name, linear in self._linears.items():
            shape = name.partition(".")[0], linear.weight.device, linear.weight.shape
            groups[name in within, shape].append(name)
        for (keeps_weights, _), names in groups.items():
            rotations = [self._rotated[name].rotation for name in names]
            cache = RotationCache(rotations, [self._linears[name] for name in names])
            for index, name in enumerate(names):
                self._rotated[name].share(cache, index, keeps_weights)

    def _within_bound(self) -> set[str]:
        """The layers whose rotated weights may be kept together, the small ones first."""
        within, total = set(), 0
        for name, linear in sorted(self._linears.items(), key=lambda item: item[1].weight.numel()):
            total += linear.weight.numel() * linear.weight.element_size()
            if total > KEPT_WEIGHT_BYTES:
                break
            within.add(name)
        return within

    def remove(self) -> None:
        """Restore the models exactly: weights, layers and `requires_grad`. Without effect if it is not attached."""
        if self._attached:
            self.unmerge()
            self.detach()

    def merge_and_unload(self) -> None:
        """Leave the rotated weights in the models for good, whose layers are plain ones again; `W` is forgotten.

        What required gradients before `attach` does so again. The adapter keeps what it has learned, and can be saved.
        Without effect if it is not attached. Raises GSOFTError as `RotatedLayer.check` does.
        """
        if self._attached:
            self.merge()
            for _, _, rotated in self.layers():
                rotated.forget()
            self.detach()
            self._unloaded = True

    def detach(self) -> None:
        """Leave the models with the weights that are in them: what `remove` and `merge_and_unload` end with."""
        self.refresh()  # or what was made of the learned numbers would take up memory
        for hook in self._preparing:
            hook.remove()
        self._preparing.clear()
        for module in {whole_of(linear): None for linear in self._linears.values()}:
            if isinstance(module, RotatedLinear):
                take_off(module)
        for parameter in self._required_grad:
            parameter.requires_grad_(True)
        self._required_grad, self._attached = [], False

    def refresh(self) -> None:
        """Forget what was made of the learned numbers. Call it after writing to them behind PyTorch's back.

        That is through `parameter.data`, as some averages of weights do, or by a library's own kernels. Ordinary
        in-place operations and optimizers need no such call.
        """
        for _, _, rotated in self.layers():
            rotated.refresh()

    @property
    def merged(self) -> bool:
        """Whether the rotated weights are in the models: after `merge`, until `unmerge`."""
        return any(rotated.merged for rotated in self._rotated.values())

    def merge(self) -> None:
        """Write the rotated weights into the models, which then cost exactly what the base models cost.

        `unmerge` afterwards if the adapter is to be trained or loaded again: merged weights do not follow it. Raises
        GSOFTError if the adapter is not attached, and as `RotatedLayer.check` does, before anything is changed.
        """
        if not self._attached:
            raise GSOFTError("merge(): the adapter is not on its models; attach() puts it on")
        for _, linear, rotated in self.layers():
            if not rotated.merged:
                rotated.check(linear)
        for _, linear, rotated in self.layers():
            rotated.merge(linear)

    def unmerge(self) -> None:
        """Put the base models' weights back, bit for bit."""
        for _, linear, rotated in self.layers():
            rotated.unmerge(linear)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off: the models are the untouched base models, merged or not.

        Raises GSOFTError after `merge_and_unload`: the base models are no more.
        """
        if self._unloaded:
            raise GSOFTError("disabled(): merge_and_unload() has left no base model to come back to")
        was_merged = self.merged
        were_enabled = {rotated: rotated.enabled for rotated in self._rotated.values()}
        self.unmerge()
        for rotated in were_enabled:
            rotated.enabled = False
        try:
            yield
        finally:
            for rotated, enabled in were_enabled.items():
                rotated.enabled = enabled
            if was_merged:
                self.merge()

    def layers(self) -> Iterator[tuple[str, AnyLinear, RotatedLayer]]:
        """Every adapted layer: its name, the model's layer or the slice of one, what computes with it."""
        for name, linear in self._linears.items():
            yield name, linear, self._rotated[name]

    def rotated(self, name: str) -> RotatedLayer:
        """What computes with the layer of this name. Raises KeyError for a name that is not adapted."""
        return self._rotated[name]

    def rotation_count(self) -> int:
        """How many numbers are learned for the rotated layers, by the closed form.

        `m·n·(b−1)/2` for each rotation of a width `n`, `out_features` for each scale.
        """
        linears = self._linears.values()
        return sum(parameter_count(self.config, linear.in_features, linear.out_features) for linear in linears)

    def orthogonality_error(self) -> float:
        """Largest entry of `|QᵀQ − I|` over all rotations."""
        return max(rotated.orthogonality_error() for rotated in self._rotated.values())

    def without_gradient(self) -> list[str]:
        """After a backward pass: layers of which nothing got a gradient, as if the loss did not depend on them."""
        return [name for name, rotated in self._rotated.items() if not _has_gradient(rotated.rotation)]

    def unchanged(self) -> list[str]:
        """Layers that are as they were at the start, having learned nothing."""
        return [name for name, rotated in self._rotated.items() if rotated.rotation.is_identity]


def _has_gradient(rotation: Rotation) -> bool:
    gradients = [parameter.grad for parameter in rotation.parameters() if parameter.grad is not None]
    return any(bool(torch.count_nonzero(gradient)) for gradient in gradients)
