"""Adapter files: one safetensors file that says everything needed to use it, and is trusted with nothing.

Tensors: parameters of an adapter under their names in `Adapter.state_dict()`. Metadata: one key holds the version of
the format; the others, here called sections, hold JSON objects.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gsoft.config import RotationConfig
from gsoft.errors import FileError, GSOFTError
from gsoft.fingerprint import BaseModelIdentity, is_fingerprint
from gsoft.rotation import parameter_shapes
from gsoft.whole_file import whole_file

FINITE_CHECKED = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
MAX_HEADER = 4 * 2**20  # bytes; a tensor takes 100 to 150, and the largest models have some thousands


@dataclass(frozen=True)
class Format:
    """A kind of adapter file.

    key: the metadata entry that tells the kind, and holds the version. version: the one that is written. sections: the
    other entries, JSON objects. program: what reads and writes it, for error messages. earlier: versions that are read
    beside that.
    """

    key: str
    version: str
    sections: tuple[str, ...]
    program: str
    earlier: tuple[str, ...] = ()

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], sections: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a file, complete or not at all: beside the target first, then renamed over it.

        path: where to; a file of that name is replaced. tensors: by name, on any device. sections: JSON objects for all
        of `self.sections`.

        Raises FileError if a tensor is not finite or the file cannot be written, and ValueError or TypeError if a
        section is not JSON.
        """
        path = Path(path)
        tensors = _apart(tensors)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise FileError(f"{path} was not written: {name} is not finite; train again with a lower learning rate")
        metadata = {name: json.dumps(sections[name], allow_nan=False) for name in self.sections}
        content = save(tensors, {self.key: self.version} | metadata)
        if (length := int.from_bytes(content[:8], "little")) > MAX_HEADER:
            raise FileError(f"{path} was not written: its header takes {length} bytes, and {MAX_HEADER} are read")
        try:
            with whole_file(path) as file:
                file.write(content)
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror}") from error

    @contextmanager
    def open(self, path: str | Path) -> Iterator[OpenFile]:
        """Inside the block an adapter file is open whose header and sections are sound; see `OpenFile`.

        Nothing in the file is executed or used as a path, and what is allocated is bounded by the size of the file.
        Raises FileError naming the file and what is wrong with it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileError(f"{path}: no such adapter file")
        try:
            check_header(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                sections = self._read_sections(path, metadata)
                yield OpenFile(path, metadata[self.key], sections, file)
        except (OSError, SafetensorError) as error:
            raise FileError(f"{path}: not a readable safetensors file ({error})") from error

    def _read_sections(self, path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        if self.key not in metadata:
            refuse(path, f"its metadata has no {self.key}; it is something else, such as a LoRA or a whole model")
        if metadata[self.key] not in (self.version, *self.earlier):
            refuse(
                path,
                f"format version {metadata[self.key]!r} is unknown, {self.version!r} expected; update {self.program}",
            )
        sections = {}
        for name in self.sections:
            try:
                section = strict_json(metadata[name])
            except KeyError:
                refuse(path, f"its metadata has no {name}")
            except (ValueError, RecursionError) as error:
                refuse(path, f"its metadata {name} is not valid JSON ({error})")
            if not isinstance(section, dict):
                refuse(path, f"its metadata {name} is not a JSON object")
            sections[name] = section
        return sections


class OpenFile:
    """An adapter file whose header is sound and whose tensors are not read yet.

    version: of the format. sections: the metadata's JSON objects; shapes and dtypes ("F32" and others): of the tensors,
    by name.
    """

    def __init__(self, path: Path, version: str, sections: dict[str, dict[str, Any]], file: Any) -> None:
        self.path, self.version, self.sections = path, version, sections
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        self.shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
        self.dtypes = {name: header.get_dtype() for name, header in headers.items()}
        self._file = file

    def check_float32(self, name: str) -> None:
        """Raise FileError unless the tensor is float32."""
        if self.dtypes[name] != "F32":
            refuse(self.path, f"{name} is {self.dtypes[name]}, not F32")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, in memory of their own. Raises FileError if a value is not finite."""
        tensors = {name: self._file.get_tensor(name).clone() for name in self.shapes}  # else views of the open file
        for name, tensor in tensors.items():
            if self.dtypes[name] not in FINITE_CHECKED:
                refuse(self.path, f"{name} is {self.dtypes[name]}; known are {', '.join(FINITE_CHECKED)}")
            if not tensor.isfinite().all():
                refuse(self.path, f"{name} has values that are not finite")
        return tensors

    def base_model(self) -> BaseModelIdentity:
        """What the section `base_model` says. Raises FileError if it is malformed."""
        section = self.sections["base_model"]
        name, print_ = section.get("name"), section.get("fingerprint")
        if not (set(section) == {"name", "fingerprint"} and isinstance(name, str) and isinstance(print_, str)):
            refuse(self.path, "its metadata base_model must have a name and a fingerprint")
        if any(unicodedata.category(character) == "Cc" for character in name):
            refuse(self.path, "the name of its base model has control characters")
        if not is_fingerprint(print_):
            refuse(self.path, "the fingerprint of its base model is malformed")
        return BaseModelIdentity(name, print_)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in main memory, each in memory of its own, as safetensors wants them; tied ones are copied."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        moved = tensor.detach().cpu().contiguous()
        apart[name] = moved.clone() if moved.data_ptr() in taken else moved
        taken.add(moved.data_ptr())
    return apart


def check_header(path: Path) -> None:
    """Before safetensors sees it: the header is not longer than an adapter's can be, and says nothing twice.

    Of two entries with one name, safetensors believes the last, and other readers may believe the first. Raises
    FileError, and OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length == 0 or length > path.stat().st_size - 8:
            refuse(path, "it is cut short, or no safetensors file at all")
        if length > MAX_HEADER:
            refuse(path, f"its header claims {length} bytes, more than the {MAX_HEADER} that any adapter needs")
        header = file.read(length)
    try:
        strict_json(header.decode())
    except (ValueError, RecursionError) as error:
        refuse(path, f"its header is not valid JSON ({error})")


def strict_json(text: str) -> Any:
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


def check_rotation_shapes(path: Path, config: RotationConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every layer has exactly the parameters of the settings, in shapes that some width explains.

    path: the file, for the message. config: the settings that it names. found: shapes of the learned numbers of rotated
    layers, by name. Raises FileError.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in found.items():
        layer, _, parameter = name.rpartition(".")
        ndim = {"q_in": 3, "q_out": 3, "output_scale": 1}.get(parameter)
        if not layer or ndim is None:
            refuse(path, f"unexpected key {name}")
        if len(shape) != ndim or min(shape) < 1:
            refuse(path, f"{name} has the impossible shape {shape}")
        layers[layer][parameter] = shape
    if not layers:
        refuse(path, "it holds no tensors")
    wanted_names = ["q_in", *(["q_out"] if config.double else []), *(["output_scale"] if config.output_scale else [])]
    expected: dict[str, tuple[int, ...]] = {}
    for layer, shapes in layers.items():
        for parameter in wanted_names:
            if parameter not in shapes:
                refuse(path, f"{layer}.{parameter} is missing")
        in_features = _width(shapes["q_in"])
        out_features = shapes["output_scale"][0] if "output_scale" in shapes else _width(shapes.get("q_out", (0, 0, 0)))
        try:
            wanted = parameter_shapes(config, in_features, out_features, layer)
        except GSOFTError as error:
            refuse(path, f"its shapes do not fit its settings ({error})")
        expected |= {f"{layer}.{parameter}": shape for parameter, shape in wanted.items()}
    compare_shapes(path, found, expected, "its settings")


def _width(shape: tuple[int, ...]) -> int:
    """`n = r·b` of a rotation stored as `(m, r, b(b−1)/2)`."""
    _, nblocks, free = shape
    return nblocks * (1 + math.isqrt(1 + 8 * free)) // 2


def compare_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise FileError unless the same names have the same shapes.

    path: the file, for the message. found: the shapes in it, by name. expected: those it should have. source: what asks
    for these, in words.
    """
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            refuse(path, f"{name} is missing")
        if name not in expected:
            refuse(path, f"unexpected key {name}")
        if found[name] != expected[name]:
            refuse(path, f"{name} has shape {found[name]}, but {source} asks for {expected[name]}")


def refuse(path: Path, reason: str) -> NoReturn:
    """Raise FileError for a file that is not a valid adapter.

    path: the file. reason: what is wrong with it, as a sentence without a full stop.
    """
    raise FileError(f"{path} is not a valid adapter: {reason}")
