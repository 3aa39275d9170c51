"""Adapters of any model to a file and back: a checked safetensors file (see `gsoft.file`) with the configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gsoft.config import ALL_LINEAR, Config
from gsoft.errors import ConfigError, FileError, GSOFTError
from gsoft.file import Format, check_rotation_shapes, compare_shapes, refuse
from gsoft.fingerprint import BaseModelIdentity, check_base
from gsoft.model_adapter import ROOT, ModelAdapter
from gsoft.rotation import at_strength, parameter_shapes

FORMAT = Format("gsoft_adapter", "1", ("config", "base_model", "notes"), "gsoft")


@dataclass(frozen=True)
class AdapterFile:
    """A validated adapter file.

    tensors: finite, under the names of `ModelAdapter`'s parameters; those of rotations are float32, and their names and
    shapes agree with `config`. notes: what was given to `save`.
    """

    path: Path
    config: Config
    base_model: BaseModelIdentity
    notes: dict[str, Any]
    tensors: dict[str, Tensor]


def save(adapter: ModelAdapter, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write the adapter, complete or not at all.

    adapter: merged or not. path: where to; a file of that name is replaced. notes: JSON values, kept for `read`.

    Layers that have learned nothing while others have are a UserWarning. Raises FileError if a value is not finite or
    the file cannot be written, and GSOFTError inside of `adapter.disabled()` with modules to save, and where FSDP has
    spread the learned numbers over processes. What `fully_shard` has spread is gathered: then all processes must call.
    """
    if adapter.modules_to_save.set_aside:
        raise GSOFTError("save: inside of disabled() the modules to save have the base model's values; save after it")
    tensors = {name: _gathered(tensor) for name, tensor in adapter.state_dict().items()}
    _check_whole(adapter, tensors)
    unchanged = adapter.unchanged()
    if 0 < len(unchanged) < len(adapter.targets.layers):
        warnings.warn(
            f"{len(unchanged)} of {len(adapter.targets.layers)} layers have learned nothing, {unchanged[0]} for "
            "example; after a backward pass, adapter.without_gradient() names the layers that the loss does not reach",
            stacklevel=2,
        )
    sections = {"config": adapter.config.to_dict(), "base_model": asdict(adapter.base_model), "notes": notes or {}}
    FORMAT.write(path, tensors, sections)


def _gathered(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor's
    return whole


def _check_whole(adapter: ModelAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Raise GSOFTError unless this process has all numbers of all rotations."""
    for path, layer in adapter.targets.layers.items():
        shapes = parameter_shapes(adapter.config, layer.in_features, layer.out_features, path)
        for parameter, shape in shapes.items():
            found = tensors[f"{ROOT}.{path}.{parameter}"]
            if tuple(found.shape) != shape:
                raise GSOFTError(
                    f"save: {path}.{parameter} is spread over processes (FSDP); gather the adapter on all of them: "
                    "with FSDP.summon_full_params(module): gsoft.save(…)"
                )


def read(path: str | Path) -> AdapterFile:
    """Read an adapter file and check what can be checked without the model: header, settings, names, shapes, values.

    Nothing in the file is executed or used as a path, and what is allocated is bounded by the size of the file.
    Raises FileError naming the file and what is wrong with it.
    """
    with FORMAT.open(path) as file:
        try:
            config = Config.from_dict(file.sections["config"])
        except ConfigError as error:
            refuse(file.path, f"bad adapter settings ({error})")
        base_model = file.base_model()
        rotations = {name: shape for name, shape in file.shapes.items() if not _is_saved(name)}
        if not config.modules_to_save and len(rotations) < len(file.shapes):
            refuse(file.path, f"unexpected key {next(name for name in file.shapes if _is_saved(name))}")
        for name in rotations:
            if not name.startswith(f"{ROOT}."):
                refuse(file.path, f"unexpected key {name}")
            file.check_float32(name)
        check_rotation_shapes(file.path, config, rotations)
        return AdapterFile(file.path, config, base_model, file.sections["notes"], file.tensors())


def load(path: str | Path, model: nn.Module, *, strength: float = 1.0, accept_other_base: bool = False) -> ModelAdapter:
    """Read an adapter file and put it on its base model, with the configuration that it was trained with.

    path: what `save` wrote. model: the base model. strength: from 0, the base model, to 1, what was trained, or any
    finite number; see `gsoft.rotation.at_strength`. accept_other_base: see `adapter_for`. Modules to save are taken as
    they were trained. If the model is on the meta device, the adapter is on the CPU, and waits for the model's weights.
    Returns the adapter, attached. For several adapters on one model see `AdapterStack`.

    Raises GSOFTError, with the model unchanged, if the file is not valid, belongs to another base model, or does not
    have exactly the parameters that the model asks for, if the strength is not finite, or if another adapter is on the
    model.
    """
    file = read(path)
    adapter = adapter_for(file, model, accept_other_base=accept_other_base)
    on_meta = [name for name, tensor in adapter.state_dict().items() if tensor.is_meta]
    if saved := next(filter(_is_saved, on_meta), None):
        raise GSOFTError(f"{saved} is on the meta device, and is trained as a whole: give the model its weights first")
    tensors = at(file, strength)
    adapter.attach()
    adapter.load_state_dict(tensors, assign=bool(on_meta))  # a copy to the meta device would be lost
    return adapter


def adapter_for(file: AdapterFile, model: nn.Module, *, accept_other_base: bool = False) -> ModelAdapter:
    """A new adapter as the file asks for, not attached: its numbers are not loaded yet.

    file: what `read` gave. model: the base model, left unchanged. accept_other_base: take a model of the same
    architecture with other weights as well, such as a fine-tune of the base model; how far away its weights are is a
    warning of the logger `gsoft`.

    Raises FileError unless the file belongs to this model, and GSOFTError if its layers are not there.
    """
    try:
        adapter = ModelAdapter(_without_patterns(file), model)
    except GSOFTError as error:
        if file.config.target_modules != ALL_LINEAR and isinstance(file.config.target_modules, str):
            raise FileError(
                f"{file.path}: {type(model).__name__} does not have the layers that it is for, those of the expression "
                f"{file.config.target_modules}"
            ) from error
        raise
    adapter.config = file.config
    check_base(file.path, file.base_model, adapter.base_model, accept_other_base, "accept_other_base=True")
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    compare_shapes(file.path, shapes, expected, "its base model")
    for name, tensor in adapter.modules_to_save.state_dict(prefix="modules_to_save.").items():
        given = file.tensors[name].dtype
        if given != tensor.dtype and not (given.is_floating_point and tensor.is_floating_point()):
            raise FileError(f"{file.path}: {name} is {given}, but its base model has {tensor.dtype} there")
    return adapter


def _without_patterns(file: AdapterFile) -> Config:
    """The file's settings with its layers by their paths, if it has a regular expression.

    A stranger's expression is not run: there are some that take hours for a short text.
    """
    config = file.config
    chosen_by = (config.target_modules, config.exclude_modules)
    if not any(isinstance(names, str) and names != ALL_LINEAR for names in chosen_by):
        return config
    rotations = (name for name in file.tensors if not _is_saved(name))
    paths = dict.fromkeys(name.removeprefix(f"{ROOT}.").rpartition(".")[0] for name in rotations)
    return replace(config, target_modules="|".join(map(re.escape, paths)), exclude_modules=())


def at(file: AdapterFile, strength: float) -> dict[str, Tensor]:
    """The file's tensors, by name, with its rotations at a strength.

    file: what `read` gave. strength: see `gsoft.rotation.at_strength`. Modules to save stay as they were trained.
    Raises GSOFTError if the strength is not finite.
    """
    rotations = {name: tensor for name, tensor in file.tensors.items() if not _is_saved(name)}
    return file.tensors | at_strength(rotations, strength)


def _is_saved(name: str) -> bool:
    return name.startswith("modules_to_save.")
