"""The adapter as one safetensors file: it has everything needed to use it, and is checked before use.

Tensors: the adapter's parameters, float32, under their names in `Adapter.state_dict()`. Metadata: the key
`gsoft_diffusion_adapter` holds the version of the format; `config`, `base_model`, `training` and `prompts` hold JSON.

Other programs read tensors without metadata. What they could not know from shapes is the name of an empty tensor:
`parametrization.` and the setting of that name, by default `parametrization.scaled_cayley`. Version 1 of the format had
none.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gsoft.file import Format, check_rotation_shapes, compare_shapes, refuse
from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.config.adapter import recorded
from gsoft_diffusion.config.settings import Settings
from gsoft_diffusion.foundation.errors import UserError, user_errors
from gsoft_diffusion.foundation.run_folder import ADAPTER

FIRST_VERSION = "1"
FORMAT = Format(
    "gsoft_diffusion_adapter",
    "2",
    ("config", "base_model", "training", "prompts"),
    "gsoft-diffusion",
    earlier=(FIRST_VERSION,),
)
# In what a file says of its training, where "step" is the best of a run: after how many steps the run ended.
LAST_STEP = "last_step"
PARAMETRIZATION = "parametrization."  # what the name of the empty tensor starts with


@dataclass(frozen=True)
class AdapterFile:
    """A validated adapter file: `tensors` are finite float32, and their names and shapes agree with `config`."""

    path: Path
    config: AdapterConfig
    base_model: BaseModelIdentity
    training: dict[str, Any]
    prompts: dict[str, Any]
    tensors: dict[str, Tensor]

    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors: so `save_adapter` takes a file as well, and writes one of an earlier version anew."""
        return self.tensors

    @property
    def changes_nothing(self) -> bool:
        """Whether all rotations are identities and all scales 1, as at the start of training."""
        return all((tensor == name.endswith("output_scale")).all() for name, tensor in self.tensors.items())

    @property
    def step(self) -> int | None:
        """After how many steps the adapter was as it is, None if the file does not say."""
        return _whole(self.training.get("step"))

    @property
    def last_step(self) -> int | None:
        """How many steps the run had done that wrote the file: more than `step` if that was the best. None as there."""
        return _whole(self.training.get(LAST_STEP, self.training.get("step")))

    @property
    def subjects(self) -> list[dict[str, str]]:
        """Each subject's known names: instance_prompt, class_prompt, unique_token, class_word."""
        several = self.prompts.get("subjects")
        subjects = several if isinstance(several, list) and several else [self.prompts]
        return [
            {name: text for name, text in subject.items() if isinstance(text, str)} if isinstance(subject, dict) else {}
            for subject in subjects
        ]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


class SavableAdapter(Protocol):
    """What `save_adapter` asks of an adapter: its settings, and its parameters by their names in the file."""

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
    """Write the adapter completely or not at all: to a temporary file, which is then renamed.

    path: of the file.
    adapter: whose settings and parameters are written.
    base_model: the model it was trained on, by which `check_base` recognises it.
    training, prompts: JSON values, kept for `read_adapter`.

    Raises UserError if a parameter is not finite or the file cannot be written.
    """
    sections = {
        "config": adapter.config.to_dict(),
        "base_model": asdict(base_model),
        "training": training,
        "prompts": prompts,
    }
    config = adapter.config
    mark = {f"{PARAMETRIZATION}{config.parametrization}": torch.empty(0)} if isinstance(config, AdapterConfig) else {}
    FORMAT.write(path, {**mark, **adapter.state_dict()}, sections)


@user_errors()
def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter file and check what can be checked without the model: header, settings, names, shapes, values.

    Nothing in the file is executed or used as a path, and what is allocated is bounded by the size of the file.
    Raises UserError naming the file and what is wrong with it.

    path: the file, or the folder that holds it as `adapter.safetensors`: a run's or a checkpoint's.
    """
    with FORMAT.open(_adapter_in(Path(path))) as file:
        try:
            config = AdapterConfig.from_dict(recorded(file.sections["config"]))
        except UserError as error:
            refuse(file.path, f"bad adapter settings ({error})")
        if config.leaves_size_open:
            refuse(file.path, "its settings have neither nblocks nor block_size")
        for name in file.shapes:
            file.check_float32(name)
        marks = {name: shape for name, shape in file.shapes.items() if name.startswith(PARAMETRIZATION)}
        wanted = {f"{PARAMETRIZATION}{config.parametrization}": (0,)} if file.version != FIRST_VERSION else {}
        compare_shapes(file.path, marks, wanted, "its format")
        rotations = {name: shape for name, shape in file.shapes.items() if name not in marks}
        check_rotation_shapes(file.path, config, rotations)
        tensors, base_model = file.tensors(), file.base_model()
        tensors = {name: tensors[name] for name in rotations}
        return AdapterFile(file.path, config, base_model, file.sections["training"], file.sections["prompts"], tensors)


def _adapter_in(path: Path) -> Path:
    """The path of the adapter file, given by itself or by its folder."""
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
    """Read adapters for use together. Raises as `read_adapter`, and UserError if one is given twice, or copied."""
    files: list[AdapterFile] = []
    for path in paths:
        file = read_adapter(path)
        if same := next((other for other in files if other.path.samefile(file.path)), None):
            raise UserError(f"--adapter {path}: is the same file as {same.path}; give it once, with a --strength")
        if same := next((other for other in files if filecmp.cmp(other.path, file.path, shallow=False)), None):
            raise UserError(f"--adapter {path}: holds the same as {same.path}; give one of them, with a --strength")
        files.append(file)
    return files
