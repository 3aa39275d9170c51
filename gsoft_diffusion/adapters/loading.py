"""Putting an adapter's file into its base model, and finding that model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gsoft.fingerprint
from gsoft.file import compare_shapes
from gsoft.fingerprint import BaseModelIdentity, name_of
from gsoft.rotation import at_strength
from gsoft_diffusion.adapters.file import AdapterFile, read_adapter
from gsoft_diffusion.adapters.identity import fingerprint
from gsoft_diffusion.adapters.injection import Adapter, expected_shapes, inject
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError, printable, user_errors
from gsoft_diffusion.foundation.model_names import local_model
from gsoft_diffusion.foundation.run_folder import SETTINGS, run_folder
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import family_of, load_model


def load_adapter(
    path: str | Path,
    unet: nn.Module,
    text_encoders: Sequence[nn.Module] = (),
    *,
    strength: float = 1.0,
    accept_other_base: bool = False,
) -> tuple[Adapter, AdapterFile]:
    """Read an adapter file and put it into its base model, with the settings it was trained with.

    path: the file, or the folder that holds it, as in `read_adapter`.
    unet: the denoiser, a UNet or a transformer.
    text_encoders: those that were given to `fingerprint` in training, in the pipeline's order.
    strength: from 0, the base model, to 1, what was trained; see `gsoft.rotation.at_strength`. For several adapters on
    one model see `AdapterStack`.
    accept_other_base: see `check_base`.

    Returns the adapter, which is attached, and what its file says. Raises UserError, with the models unchanged, if the
    file is not valid, belongs to another base model, or does not have exactly the parameters that the model asks for.
    """
    file = read_adapter(path)
    check_base(file, unet, text_encoders, accept_other_base=accept_other_base)
    adapter = inject(file.config, unet, text_encoders)
    adapter.load_state_dict(at_strength(file.tensors, strength))
    return adapter, file


@user_errors()
def check_base(
    file: AdapterFile, unet: nn.Module, text_encoders: Sequence[nn.Module] = (), *, accept_other_base: bool = False
) -> None:
    """Raise UserError unless the adapter was trained on these models, which it looks at without changing them.

    file: the adapter. unet, text_encoders: as in `load_adapter`. accept_other_base: take models of the same
    architecture with other weights as well, such as a fine-tune of the base model; how far away their weights are is a
    warning of the logger `gsoft`.
    """
    given = BaseModelIdentity(name_of(unet), fingerprint(unet, text_encoders))
    gsoft.fingerprint.check_base(file.path, file.base_model, given, accept_other_base, "--accept_other_base")
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    compare_shapes(file.path, shapes, expected_shapes(file.config, unet, text_encoders), "its base model")


def load_base(
    file: AdapterFile,
    moved_to: str | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    cpu_offload: bool = False,
    offload_layers: bool = False,
) -> BaseModel:
    """Load the model that an adapter was trained on, or another.

    file: the adapter.
    moved_to: name, folder or file of the model to load instead; None for the one that the adapter was trained on.
    dtype, device, cpu_offload, offload_layers: as in `load_model`.

    An adapter has the model's name only, the settings of its run also know where it is: where they are beside it, they
    are asked first. Prints whose word was taken. Raises UserError if the model is not found, or as `load_model`.
    """
    name, versions, source = _place_of_base(file, moved_to)
    if not moved_to:
        print(printable(f"base model: {name}, as {source} says"))
    return load_model(
        name,
        **versions,
        dtype=dtype,
        device=device,
        cpu_offload=cpu_offload,
        offload_layers=offload_layers,
    )


def family_of_base(file: AdapterFile, moved_to: str | None = None) -> type[BaseModel]:
    """The family of the model that `load_base` would load; no weights are read.

    file, moved_to: as there. Raises UserError if the model is not found, or is of no family.
    """
    name, versions, _ = _place_of_base(file, moved_to)
    versions.pop("variant", None)  # which is of its weights
    return family_of(name, **versions)


def _place_of_base(file: AdapterFile, moved_to: str | None) -> tuple[str, dict[str, Any], Path]:
    """The base model's name or place, the arguments of `load_model` that say which version, and the file that says so.

    UserError if it is not there.
    """
    settings, source = _settings_beside(file)
    name = moved_to or settings["pretrained_model_name_or_path"]
    names = ("base_config",) if moved_to else ("base_config", "revision", "variant")
    versions = {key: settings[key] for key in names if isinstance(settings.get(key), str)}
    if not moved_to and local_model(name) is None and (Path(name).is_absolute() or "/" not in name):
        raise UserError(
            f"{file.path}: its base model is {name}, as {source} says, which is not there; give its place with "
            "--pretrained_model_name_or_path"
        )
    return name, versions, source


def _settings_beside(file: AdapterFile) -> tuple[Mapping[str, Any], Path]:
    """What the adapter's run was told of its base model, and the file that says so: the run's settings if they are
    there and of this base, else the adapter.
    """
    path = run_folder(file.path) / SETTINGS
    try:
        settings = read_yaml(path)
    except UserError:  # none, or not of a run
        settings = {}
    name = settings.get("pretrained_model_name_or_path")
    if isinstance(name, str) and Path(name).name == Path(file.base_model.name).name:
        return settings, path
    return file.training | {"pretrained_model_name_or_path": file.base_model.name}, file.path
