"""Putting an adapter's file into its base model, and finding that model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from gsoft_diffusion.models.loading import family_of, has_variant, load_model
from gsoft_diffusion.models.single_file import is_single_file


@user_errors()
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
    one model see `AdapterStack`. Any finite number.
    accept_other_base: see `check_base`.

    Returns the adapter, which is attached, and what its file says. Raises UserError, with the models unchanged, if the
    file is not valid, belongs to another base model, or does not have exactly the parameters that the model asks for,
    or if the strength is not finite.
    """
    file = read_adapter(path)
    check_base(file, unet, text_encoders, accept_other_base=accept_other_base)
    tensors = at_strength(file.tensors, strength)
    adapter = inject(file.config, unet, text_encoders)
    adapter.load_state_dict(tensors)
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
    variant: str | None = None,
    base_config: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    cpu_offload: bool = False,
    offload_layers: bool = False,
) -> BaseModel:
    """Load the model that an adapter was trained on, or another.

    file: the adapter.
    moved_to: name, folder or file of the model to load instead; None for the one that the adapter was trained on.
    variant, base_config: as in `load_model`, instead of what the adapter's run was told; None for that, where it is to
    be found.
    dtype, device, cpu_offload, offload_layers: as in `load_model`.

    An adapter has the model's name only, the settings of its run also know where it is: where they are beside it, they
    are asked first. Prints whose word was taken, and if a configuration is not there that they name. Raises UserError
    if the model is not found, for a version that it cannot have, or as `load_model`.
    """
    base = _base_of(file, moved_to, variant=variant, base_config=base_config)
    if not moved_to:
        print(printable(f"base model: {base.name}, as {base.source} says"))
    if base.lost:
        named = f"{base.lost}, which {base.source} names"
        print(printable(f"note: the configuration {named}, is not there, so the usual one is taken"))
    return load_model(
        base.name,
        **base.versions,
        dtype=dtype,
        device=device,
        cpu_offload=cpu_offload,
        offload_layers=offload_layers,
    )


def family_of_base(
    file: AdapterFile, moved_to: str | None = None, *, base_config: str | None = None
) -> type[BaseModel]:
    """The family of the model that `load_base` would load; no weights are read.

    file, moved_to, base_config: as there. Raises UserError if the model is not found, or is of no family.
    """
    base = _base_of(file, moved_to, base_config=base_config)
    versions = {key: value for key, value in base.versions.items() if key != "variant"}  # which is of its weights
    return family_of(base.name, **versions)


@dataclass(frozen=True)
class _Base:
    """Where an adapter's base model is.

    name: its name or place. versions: the arguments of `load_model` that say which version. source: the file that says
    so. lost: a configuration that the file names, and that is not there.
    """

    name: str
    versions: dict[str, Any]
    source: Path
    lost: str | None


def _base_of(file: AdapterFile, moved_to: str | None, **given: str | None) -> _Base:
    """Where the base model is. given: `variant` and `base_config`, None where the run's are to be taken.

    UserError if it is not there, or for a version that it cannot have.
    """
    settings, source = _settings_beside(file)
    name = moved_to or settings["pretrained_model_name_or_path"]
    if not moved_to and _is_nowhere(name):
        raise UserError(
            f"{file.path}: its base model is {name}, as {source} says, which is not there; give its place with "
            "--pretrained_model_name_or_path"
        )
    chosen = {key: value for key, value in given.items() if value}
    single = is_single_file(name)
    if "base_config" in chosen and not single:
        raise UserError(f"--base_config would have no effect: {name} is no single .safetensors file; leave it out")
    if "variant" in chosen and single:
        raise UserError(f"--variant would have no effect: {name} is a single file; leave it out")
    keys = ("base_config", "revision", "variant")
    told = {key: settings[key] for key in keys if key not in chosen and isinstance(settings.get(key), str)}
    if moved_to:  # where the model may be kept otherwise
        told.pop("revision", None)
        if "variant" in told and not has_variant(name, told["variant"]):
            del told["variant"]
    lost = None
    if single and "base_config" in told and _is_nowhere(told["base_config"]):
        lost = told.pop("base_config")
    return _Base(name, told | chosen, source, lost)


def _is_nowhere(name: str) -> bool:
    """Whether a model's name is none of a folder or file on this disk, and cannot be one on the hub."""
    return local_model(name) is None and (Path(name).is_absolute() or "/" not in name)


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
