"""The adapter as one safetensors file that says everything needed to use it, and is trusted with nothing.

Tensors: the adapter's parameters, float32, under their names in `Adapter.state_dict()`. Metadata: the key
`gsoft_diffusion_adapter` holds the version of the format; `config`, `base_model`, `training` and `prompts` hold JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

from gsoft_diffusion.attention import attention_layers
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.files import whole_file
from gsoft_diffusion.injection import ATTENTIONS, Adapter, clip_attention_layers, expected_shapes, inject
from gsoft_diffusion.projection import at_strength, parameter_shapes
from gsoft_diffusion.quantization import numbers_in
from gsoft_diffusion.settings import Settings

ADAPTER = "adapter.safetensors"  # what training calls it, in a run's folder and in those of checkpoints
FORMAT_KEY, FORMAT_VERSION = "gsoft_diffusion_adapter", "1"
MAX_HEADER = 4 * 2**20  # bytes; the largest adapters have about two thousand tensors, some 0.4 MB of header
SKETCH_SIZE = 16
SKETCH_TOLERANCE = 0.01


@dataclass(frozen=True)
class BaseModelIdentity:
    """The model an adapter belongs to: a name for people, and a fingerprint (see `fingerprint`) that is compared."""

    name: str
    fingerprint: str


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
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} was not written: {name} is not finite; train again with a lower learning rate")
    sections = {
        "config": adapter.config.to_dict(),
        "base_model": asdict(base_model),
        "training": training,
        "prompts": prompts,
    }
    metadata = {name: json.dumps(section, allow_nan=False) for name, section in sections.items()}
    content = save(tensors, {FORMAT_KEY: FORMAT_VERSION} | metadata)
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter file and check what can be checked without the model: header, settings, names, shapes, values.

    Nothing in the file is executed or used as a path, and what is allocated is bounded by the size of the file.
    Raises UserError naming the file and what is wrong with it.

    path: the file, or the folder that holds it as `adapter.safetensors`: a run's or a checkpoint's.
    """
    path = _adapter_in(Path(path))
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            sections = _read_sections(path, metadata)
            config = _read_config(path, sections["config"])
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            for name, header in headers.items():
                if header.get_dtype() != "F32":
                    _refuse(path, f"{name} is {header.get_dtype()}, not F32")
            _check_shapes(path, config, {name: tuple(header.get_shape()) for name, header in headers.items()})
            tensors = {name: file.get_tensor(name).clone() for name in headers}  # else they stay views of the open file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            _refuse(path, f"{name} has values that are not finite")
    base_model = _read_base_model(path, sections["base_model"])
    return AdapterFile(path, config, base_model, sections["training"], sections["prompts"], tensors)


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
        files.append(file)
    return files


def load_adapter(
    path: str | Path, unet: nn.Module, text_encoders: Sequence[nn.Module] = (), *, strength: float = 1.0
) -> tuple[Adapter, AdapterFile]:
    """Read an adapter file and put it into its base model, with the settings it was trained with.

    Pass the models that were given to `fingerprint` in training. Raises UserError, with the models unchanged, if the
    file is not valid, belongs to another base model, or does not have exactly the parameters that the model asks for.

    strength: from 0, the base model, to 1, what was trained; see `projection.at_strength`. For several adapters on one
    model see `AdapterStack`.
    """
    file = read_adapter(path)
    check_base(file, unet, text_encoders)
    adapter = inject(file.config, unet, text_encoders)
    adapter.load_state_dict(at_strength(file.tensors, strength))
    return adapter, file


def check_base(file: AdapterFile, unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> None:
    """Raise UserError unless the adapter was trained on these models, which it looks at without changing them."""
    given = BaseModelIdentity(_name_of(unet), fingerprint(unet, text_encoders))
    if difference := _difference(file.base_model.fingerprint, given.fingerprint):
        raise UserError(
            f"{file.path}: trained on the base model {file.base_model.name}, "
            f"but the model given, {given.name}, has {difference}"
        )
    found = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    _compare_shapes(file.path, found, expected_shapes(file.config, unet, text_encoders), "its base model")


def fingerprint(unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> str:
    """`<architecture>:<sketch>`: recognises a base model whichever dtype it is loaded in.

    architecture: hash of shapes and head counts of every attention and of the models' sizes; compared exactly.
    sketch: sixteen numbers of size 1 made from all attention weights (see `_sketch`), unrelated for unrelated weights,
    while rounding to half precision moves them by about 0.001; compared within 0.01. Models whose weights differ by
    less than about half a percent pass as the same.

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
    digest = hashlib.sha256(json.dumps(architecture).encode()).hexdigest()[:16]
    groups = [weights[start::SKETCH_SIZE] for start in range(min(SKETCH_SIZE, len(weights)))]
    sketch = [sum(map(_sketch, group)) / math.sqrt(len(group)) for group in groups]
    return ":".join([digest, *(f"{number:+.4f}" for number in sketch)])


@torch.no_grad()
def _sketch(weight: Tensor) -> float:
    """`uᵀWv / ‖W‖` with fixed wave-like `u` and `v`: over unrelated weights, about a standard normal number."""
    u, v = (torch.arange(1, side + 1).float().cos() * math.sqrt(2) for side in weight.shape)
    weight = weight.detach().cpu().float()
    return (u @ weight @ v / weight.norm().clamp(min=1e-12)).item()


def _difference(expected: str, given: str) -> str | None:
    """What two fingerprints disagree in, or None."""
    (expected_digest, *expected_sketch), (given_digest, *given_sketch) = expected.split(":"), given.split(":")
    if expected_digest != given_digest or len(expected_sketch) != len(given_sketch):
        return "another architecture"
    distances = [abs(float(a) - float(b)) for a, b in zip(expected_sketch, given_sketch, strict=True)]
    return "other weights" if max(distances, default=0.0) > SKETCH_TOLERANCE else None


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or type(model).__name__


def _check_header(path: Path) -> None:
    """Before safetensors sees it: the header is not longer than an adapter's can be, and says nothing twice.

    Of two entries with one name, safetensors believes the last, and other readers may believe the first.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            _refuse(path, f"its header claims {length} bytes, more than the {MAX_HEADER} that any adapter needs")
        header = file.read(length)
    try:
        _strict_json(header.decode())
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not valid JSON ({error})")


def _strict_json(text: str) -> Any:
    """What the JSON says. Raises ValueError for what is not JSON, names twice in an object, and infinite numbers."""
    return json.loads(text, parse_constant=_not_json, parse_float=_finite, object_pairs_hook=_no_name_twice)


def _not_json(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("a number is too large")
    return number


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice")
    return values


def _read_sections(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The metadata's JSON objects."""
    if FORMAT_KEY not in metadata:
        _refuse(path, f"its metadata has no {FORMAT_KEY}; it was not written by this project")
    if metadata[FORMAT_KEY] != FORMAT_VERSION:
        _refuse(
            path,
            f"format version {metadata[FORMAT_KEY]!r} is unknown, {FORMAT_VERSION!r} expected; update gsoft-diffusion",
        )
    sections = {}
    for name in ("config", "base_model", "training", "prompts"):
        try:
            section = _strict_json(metadata[name])
        except KeyError:
            _refuse(path, f"its metadata has no {name}")
        except (ValueError, RecursionError) as error:
            _refuse(path, f"its metadata {name} is not valid JSON ({error})")
        if not isinstance(section, dict):
            _refuse(path, f"its metadata {name} is not a JSON object")
        sections[name] = section
    return sections


def _read_config(path: Path, section: dict[str, Any]) -> AdapterConfig:
    try:
        return AdapterConfig.from_dict(section)
    except UserError as error:
        _refuse(path, f"bad adapter settings ({error})")


def _read_base_model(path: Path, section: dict[str, Any]) -> BaseModelIdentity:
    name, print_ = section.get("name"), section.get("fingerprint")
    if not (set(section) == {"name", "fingerprint"} and isinstance(name, str) and isinstance(print_, str)):
        _refuse(path, "its metadata base_model must have a name and a fingerprint")
    if not re.fullmatch(r"[0-9a-f]{16}(:[+-]\d{1,4}\.\d{4})*", print_):
        _refuse(path, "the fingerprint of its base model is malformed")
    return BaseModelIdentity(name, print_)


def _check_shapes(path: Path, config: AdapterConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Every layer has exactly the parameters of the settings, in shapes that some width explains."""
    layers: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in found.items():
        layer, _, parameter = name.rpartition(".")
        ndim = {"q_in": 3, "q_out": 3, "output_scale": 1}.get(parameter)
        if not layer or ndim is None:
            _refuse(path, f"unexpected key {name}")
        if len(shape) != ndim or min(shape) < 1:
            _refuse(path, f"{name} has the impossible shape {shape}")
        layers[layer][parameter] = shape
    if not layers:
        _refuse(path, "it holds no tensors")
    expected: dict[str, tuple[int, ...]] = {}
    for layer, shapes in layers.items():
        in_features = _width(shapes["q_in"]) if "q_in" in shapes else 0
        out_features = shapes["output_scale"][0] if "output_scale" in shapes else _width(shapes.get("q_out", (0, 0, 0)))
        try:
            wanted = parameter_shapes(config, in_features, out_features, layer)
        except UserError as error:
            _refuse(path, f"its shapes do not fit its settings ({error})")
        expected |= {f"{layer}.{parameter}": shape for parameter, shape in wanted.items()}
    _compare_shapes(path, found, expected, "its settings")


def _width(shape: tuple[int, ...]) -> int:
    """`n = r·b` of a rotation stored as `(m, r, b(b−1)/2)`."""
    _, nblocks, free = shape
    return nblocks * (1 + math.isqrt(1 + 8 * free)) // 2


def _compare_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            _refuse(path, f"{name} is missing")
        if name not in expected:
            _refuse(path, f"unexpected key {name}")
        if found[name] != expected[name]:
            _refuse(path, f"{name} has shape {found[name]}, but {source} asks for {expected[name]}")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise UserError(f"{path} is not a valid adapter: {reason}")
