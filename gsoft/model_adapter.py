"""An adapter for any one model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gsoft.adapter import Adapter
from gsoft.config import Config
from gsoft.fingerprint import BaseModelIdentity, fingerprint, name_of
from gsoft.linear import RotatedLinear
from gsoft.rotation import forced_zeros
from gsoft.saved_modules import SavedModules
from gsoft.targets import find_targets

ROOT = "model"  # what names of layers start with
log = logging.getLogger("gsoft")


def inject(model: nn.Module, config: Config) -> ModelAdapter:
    """Freeze a model and put a new adapter on the layers that the configuration names.

    model: any module with linear layers. config: which of them, and what is learned. Returns the adapter, attached.

    Until something is trained, the model's output stays bit-equal. What was adapted and what was skipped, with the
    reasons, is in `adapter.targets`, and goes to the logger `gsoft` at level INFO. Names that no layer has, names of
    which every layer is skipped, a `Q` that is not dense, and modules to save in half precision are a UserWarning.

    Raises GSOFTError, before anything is changed, if no layer is found, a linear layer that is named cannot be rotated,
    a width does not fit the configuration, or another adapter is on the model.
    """
    adapter = ModelAdapter(config, model)
    log.info("%s", adapter.targets)
    for name in adapter.targets.unused_names:
        warnings.warn(f"target_modules: no layer is called {name}", stacklevel=2)
    for name, path in adapter.targets.skipped_names.items():
        reason = adapter.targets.skipped[path]
        warnings.warn(f"target_modules: nothing called {name} is adapted: {path} {reason}", stacklevel=2)
    if sparse := adapter.not_dense():
        warnings.warn(
            f"Q is not dense in {len(sparse)} of {len(adapter.targets.layers)} layers, so not every entry can act on "
            f'every other, for example {sparse[0]}; nfactors="dense" takes as many factors as needed',
            stacklevel=2,
        )
    if halves := adapter.modules_to_save.in_half_precision():
        warnings.warn(
            f"modules_to_save: {halves[0]} is in half precision, where small steps of an optimizer are rounded away; "
            "load the model in float32 and train it in autocast",
            stacklevel=2,
        )
    adapter.attach()
    return adapter


class ModelAdapter(Adapter):
    """The rotations of the layers that a configuration names, and the modules that are trained as a whole.

    Parameters are named `model.<path of the layer>.q_in` and so on, and `modules_to_save.<path>.<parameter>`.

    targets: what the configuration means for the model. base_model: identity of the model as it was at the start.
    """

    config: Config

    def __init__(self, config: Config, model: nn.Module) -> None:
        """Looks at the model without changing it; see `inject` for the errors."""
        targets = find_targets(model, config)
        super().__init__(config, {f"{ROOT}.{path}": layer for path, layer in targets.layers.items()}, [model])
        self.targets = targets
        self.base_model = BaseModelIdentity(name_of(model), _fingerprint(targets.layers))
        self.modules_to_save = SavedModules(targets.saved)
        self._hooks: list[Any] = []
        self._without_nested: list[nn.TransformerEncoder] = []

    def attach(self) -> None:
        """Freeze the model, but for the modules to save, and have its layers rotated."""
        super().attach()
        self.modules_to_save.start()
        for model in self._models:
            for module in model.modules():
                if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
                    continue
                if not any(map(_is_rotated, module.modules())):
                    continue
                if isinstance(module, nn.TransformerEncoderLayer):
                    # Its fast path reads weights without calling the layers; it is not taken where there is a hook.
                    self._hooks.append(module.register_forward_pre_hook(_nothing))
                elif getattr(module, "use_nested_tensor", False):
                    # For that path it makes nested tensors of padded batches, which have gradients on it alone.
                    module.use_nested_tensor = False
                    self._without_nested.append(module)

    def remove(self) -> None:
        """Give the model back exactly as it was: weights, layers and what required gradients.

        Without effect if it is not attached.
        """
        self.modules_to_save.put_back()
        super().remove()

    def detach(self) -> None:
        """Leave the model with the weights that are in it, modules to save included."""
        self.modules_to_save.stop()
        super().detach()
        for hook in self._hooks:
            hook.remove()
        for encoder in self._without_nested:
            encoder.use_nested_tensor = True
        self._hooks, self._without_nested = [], []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model is the untouched base model, merged or not."""
        with super().disabled(), self.modules_to_save.as_before():
            yield

    def parameter_counts(self) -> dict[str, int]:
        """How many numbers are trained: in `rotations`, in `modules_to_save`, in `total`."""
        saved = sum(parameter.numel() for parameter in self.modules_to_save.parameters())
        total = sum(parameter.numel() for parameter in self.parameters())
        assert total - saved == self.rotation_count(), f"{total - saved} numbers, {self.rotation_count()} expected"
        return {"rotations": total - saved, "modules_to_save": saved, "total": total}

    def not_dense(self) -> list[str]:
        """Layers with a `Q` that has forced zeros, in words, with what would fill it."""
        described = (
            forced_zeros(self.config, layer.in_features, layer.out_features, path)
            for path, layer in self.targets.layers.items()
        )
        return [text for text in described if text is not None]


def _is_rotated(module: nn.Module) -> bool:
    return isinstance(module, RotatedLinear)


def _nothing(module: nn.Module, inputs: Any) -> None:
    """A hook that is there to be there."""


def _fingerprint(layers: dict[str, nn.Linear]) -> str:
    architecture = [[path, list(layer.weight.shape)] for path, layer in layers.items()]
    weights = [layer.weight for layer in layers.values()]
    return fingerprint(architecture, [weight for weight in weights if not weight.is_meta])
