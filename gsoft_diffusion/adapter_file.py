"""The adapter as one safetensors file that says everything needed to use it, and is trusted with nothing.

Tensors: the adapter's parameters, float32, under their names in `Adapter.state_dict()`. Metadata: the key
`gsoft_diffusion_adapter` holds the version of the format; `config`, `base_model`, `training` and `prompts` hold JSON.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

import gsoft.fingerprint
from gsoft.file import MAX_HEADER, Format, check_rotation_shapes, compare_shapes, refuse
from gsoft.fingerprint import BaseModelIdentity, difference, name_of
from gsoft.rotation import at_strength
from gsoft_diffusion.attention import attention_layers
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.errors import UserError, user_errors
from gsoft_diffusion.injection import ATTENTIONS, Adapter, clip_attention_layers, expected_shapes, inject
from gsoft_diffusion.quantization import numbers_in
from gsoft_diffusion.settings import Settings

__all__ = [
    "ADAPTER",
    "FORMAT",
    "MAX_HEADER",
    "AdapterFile",
    "BaseModelIdentity",
    "SavableAdapter",
    "check_base",
    "fingerprint",
    "load_adapter",
    "read_adapter",
    "read_adapters",
    "save_adapter",
]

ADAPTER = "adapter.safetensors"  # what training calls it, in a run's folder and in those of checkpoints

FORMAT = Format("gsoft_diffusion_adapter", "1", ("config", "base_model", "training", "prompts"), "gsoft-diffusion")


@dataclass(frozen=True)
class AdapterFile:
    """A validated adapter file: `tensors` are finite float32, and their names and shapes agree with `config`."""

    path: Path
    config: AdapterConfig
    base_model: BaseModelIdentity
    training: dict[str, Any]
    prompts: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def changes_nothing(self) -> bool:
        """Whether all rotations are identities and all scales 1, as at the start of training."""
        return all((tensor == name.endswith("output_scale")).all() for name, tensor in self.tensors.items())

    @property
    def subjects(self) -> list[dict[str, str]]:
        """What each subject is called: instance_prompt, class_prompt, unique_token, class_word, as far as known."""
        several = self.prompts.get("subjects")
        subjects = several if isinstance(several, list) and several else [self.prompts]
        return [
            {name: text for name, text in subject.items() if isinstance(text, str)} if isinstance(subject, dict) else {}
            for subject in subjects
        ]


class SavableAdapter(Protocol):
    """What `save_adapter` asks of an adapter."""

    @property
    def config(self) -> Settings: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


@user_errors()
def save_adapter(
    path: str | Path,
    adapter: SavableAdapter,
    *,
    base_model: BaseModelIdentity,
    training: Mapping[str, Any],
    prompts: Mapping[str, Any],
) -> None:
    """Write the adapter, whole or not at all: beside the target first, then renamed over it.

    training, prompts: JSON values, kept for `read_adapter`. Raises UserError if a parameter is not finite or the file
    cannot be written.
    """
    sections = {
        "config": adapter.config.to_dict(),
        "base_model": asdict(base_model),
        "training": training,
        "prompts": prompts,
    }
    FORMAT.write(path, adapter.state_dict(), sections)


@user_errors()
def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter file and check what can be checked without the model: header, settings, names, shapes, values.

    Nothing in the file is executed or used as a path, and what is allocated is bounded by the size of the file.
    Raises UserError naming the file and what is wrong with it.

    path: the file, or the folder that holds it as `adapter.safetensors`: a run's or a checkpoint's.
    """
    with FORMAT.open(_adapter_in(Path(path))) as file:
        try:
            config = AdapterConfig.from_dict(file.sections["config"])
        except UserError as error:
            refuse(file.path, f"bad adapter settings ({error})")
        for name in file.shapes:
            file.check_float32(name)
        check_rotation_shapes(file.path, config, file.shapes)
        tensors, base_model = file.tensors(), file.base_model()
        return AdapterFile(file.path, config, base_model, file.sections["training"], file.sections["prompts"], tensors)


def _adapter_in(path: Path) -> Path:
    """The adapter file that is named, by itself or by its folder."""
    try:
        if path.is_dir():
            if not (path / ADAPTER).is_file():
                raise UserError(f"{path}: holds no {ADAPTER}; name the folder of a run or of a checkpoint, or the file")
            return path / ADAPTER
        if path.is_file():
            return path
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    raise UserError(f"{path}: no such adapter file")


def read_adapters(paths: Sequence[str | Path]) -> list[AdapterFile]:
    """Read several adapters that are to act together. UserError as in `read_adapter`, or if one comes twice."""
    files: list[AdapterFile] = []
    for path in paths:
        file = read_adapter(path)
        if same := next((other for other in files if other.path.samefile(file.path)), None):
            raise UserError(f"--adapter {path}: is the same file as {same.path}; give it once, with a --strength")
        if same := next((other for other in files if filecmp.cmp(other.path, file.path, shallow=False)), None):
            raise UserError(f"--adapter {path}: holds the same as {same.path}; give one of them, with a --strength")
        files.append(file)
    return files


def load_adapter(
    path: str | Path, unet: nn.Module, text_encoders: Sequence[nn.Module] = (), *, strength: float = 1.0
) -> tuple[Adapter, AdapterFile]:
    """Read an adapter file and put it into its base model, with the settings it was trained with.

    Pass the models that were given to `fingerprint` in training. Raises UserError, with the models unchanged, if the
    file is not valid, belongs to another base model, or does not have exactly the parameters that the model asks for.

    strength: from 0, the base model, to 1, what was trained; see `gsoft.rotation.at_strength`. For several adapters on
    one model see `AdapterStack`.
    """
    file = read_adapter(path)
    check_base(file, unet, text_encoders)
    adapter = inject(file.config, unet, text_encoders)
    adapter.load_state_dict(at_strength(file.tensors, strength))
    return adapter, file


@user_errors()
def check_base(file: AdapterFile, unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> None:
    """Raise UserError unless the adapter was trained on these models, which it looks at without changing them."""
    given = BaseModelIdentity(name_of(unet), fingerprint(unet, text_encoders))
    if found := difference(file.base_model.fingerprint, given.fingerprint):
        raise UserError(
            f"{file.path}: trained on the base model {file.base_model.name}, "
            f"but the model given, {given.name}, has {found}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    compare_shapes(file.path, shapes, expected_shapes(file.config, unet, text_encoders), "its base model")


def fingerprint(unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> str:
    """Recognises a base model whichever dtype it is loaded in; see `gsoft.fingerprint.fingerprint`.

    Made of shapes and head counts of every attention, of the models' sizes, and of all attention weights.
    For models with or without an adapter, but not with a merged one.
    """
    architecture: list[Any] = [sum(map(numbers_in, model.parameters())) for model in (unet, *text_encoders)]
    weights: list[Tensor] = []
    for model in (unet, *text_encoders):
        for module in model.modules():
            if isinstance(module, ATTENTIONS) and hasattr(module, "to_q"):
                layers, heads = attention_layers(module), module.heads
            elif isinstance(module, CLIPAttention):
                layers, heads = clip_attention_layers(module), module.num_heads
            else:
                continue
            architecture.append([heads, *(list(layer.weight.shape) for layer in layers.values())])
            weights += [layer.weight for layer in layers.values()]
    return gsoft.fingerprint.fingerprint(architecture, weights)
