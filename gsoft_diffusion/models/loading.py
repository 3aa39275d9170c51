"""Loading a base model, of whichever family it is, from a diffusers folder, the hub, or a single file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DDPMScheduler, SchedulerMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from gsoft_diffusion.foundation.bundled import places
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.hub_access import why_unreachable
from gsoft_diffusion.foundation.memory import check_weights, is_apart
from gsoft_diffusion.models.families import BaseModel, find_family
from gsoft_diffusion.models.frozen_storage import FLOAT8, store
from gsoft_diffusion.models.noise import scheduler_class
from gsoft_diffusion.models.quantization import quantize, require_bitsandbytes
from gsoft_diffusion.models.single_file import is_single_file, load_parts, usual_config

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")  # what the part that denoises is called
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by the name of --mixed_precision
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}  # by safetensors' names
STORED = HALVES | {"F32": torch.float32}


def load_model(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    base_config: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    cpu_offload: bool = False,
    offload_layers: bool = False,
    quantize_base: str | None = None,
    fused_attention: bool = True,
) -> BaseModel:
    """Load a base model from a diffusers folder, the hub, or a single file; weights from safetensors only.

    name: the folder, the model's name on the hub, or the `.safetensors` file.
    revision: branch, tag or commit on the hub; by default the main branch.
    variant: what stands before `.safetensors` in the names of the weight files to load, such as fp16; networks that
    have no such files are loaded without.
    base_config: for a single file, the diffusers folder or model on the hub whose configuration it has.
    dtype: of all weights but the VAE's, which are float32; None for the one that each part's are stored in.
    device: where the model computes.
    cpu_offload: put only the denoiser on `device`; the other parts are moved there only while they compute.
    offload_layers: leave the denoiser's layers that no adapter uses in main memory; see `frozen_storage`.
    quantize_base: float8, or bitsandbytes' name of a 4-bit type, for layers that no adapter uses; see `frozen_storage`
    and `quantization`.
    fused_attention: whether an adapter is to use attention that shares matrices with the feed-forward layer.

    Returns the model with all of its weights frozen.

    Raises UserError naming the part that is missing, broken, or of an architecture that this project does not train; or
    if the weights do not fit into the device's memory.
    """
    transformers.utils.logging.disable_progress_bar()
    if offload_layers:
        check_offloading(device, quantize_base)
    if quantize_base and quantize_base != "float8":
        require_bitsandbytes()
    shrunk = bool(quantize_base or offload_layers)  # after loading all of it into main memory
    advice = _how_to_shrink(torch.device(device), dtype, cpu_offload, shrunk)
    if is_single_file(name):
        folder, family, index_values = _find_config(name, base_config)
        file = Path(name).expanduser()
        dtype = dtype or _stored_dtype([file])
        check_weights(name, [(file, dtype)], "cpu" if cpu_offload or shrunk else device, advice)
        parts = load_parts(name, family, folder, dtype)
    else:
        folder, family, index_values = _find(name, revision, variant)
        weights: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        variants = _variants(name, folder, family, variant)
        files = {part: _weight_files(folder / part, variants.get(part)) for part in family.parts()}
        dtypes = {part: dtype or _stored_dtype(paths) for part, paths in files.items()} | {"vae": torch.float32}
        weight_files = {part: [(path, dtypes[part]) for path in paths] for part, paths in files.items()}
        apart = is_apart(torch.device(device))
        if not (shrunk and apart):
            counted = [part for part in files if not cpu_offload or part in DENOISERS]
            check_weights(name, [each for part in counted for each in weight_files[part]], device, advice)
        if apart:
            copied = _copied(weight_files, offload_layers, quantize_base)
            check_weights(name, copied, "cpu", _how_to_shrink(torch.device("cpu"), dtype, cpu_offload, shrunk))
        parts = {}
        for part, kind in family.parts().items():
            options = weights | {"torch_dtype": dtypes[part], "variant": variants.get(part)}
            parts[part] = _load(part, folder, _loader(part, kind, options))
    model = _assembled(family, name, index_values, parts)
    if torch.device(device).type != "cpu":
        model.vae.enable_slicing()  # one picture at a time, for in float32 several of them take gigabytes
    untrained = [reader for reader in model.all_text_encoders() if reader not in model.text_encoders]
    for network in parts.values():
        if isinstance(network, nn.Module):
            try:
                network.requires_grad_(False)
                on_device = network is model.denoiser or not cpu_offload
                in_main_memory = offload_layers and network is model.denoiser
                bits = quantize_base if network is model.denoiser or network in untrained else None
                if bits == "float8" or in_main_memory:
                    store(network, fused_attention, float8=bits == "float8", in_main_memory=in_main_memory)
                elif bits:
                    quantize(network, bits, device if on_device else "cpu", fused_attention)
                if on_device:
                    network.to(device)
            except (RuntimeError, AssertionError, TypeError) as error:  # no such device or dtype, or its memory is full
                raise UserError(f"cannot put {name} on {device}: {first_line(error)}") from error
    return model


def _copied(
    weight_files: Mapping[str, Sequence[tuple[Path, torch.dtype]]], offload_layers: bool, quantize_base: str | None
) -> list[tuple[Path, torch.dtype]]:
    """The files whose weights main memory gets copies of on the way to a GPU, each with the dtype of these copies.

    Those that stay there or become others, as if all of a network did. The others are mapped from their files.

    weight_files: of each part, with the dtype that it gets. offload_layers, quantize_base: as in `load_model`.
    """
    copied = []
    for part, files in weight_files.items():
        for path, dtype in files:
            if _is_converted(path, dtype):
                copied.append((path, dtype))
            elif quantize_base == "float8" and part != "vae":
                copied.append((path, FLOAT8))
            elif offload_layers and part in DENOISERS:
                copied.append((path, dtype))
    return copied


def _how_to_shrink(device: torch.device, dtype: torch.dtype | None, cpu_offload: bool, shrunk: bool) -> str:
    """The flags of training and drawing with which weights take less of the device that is too small for them."""
    found = ["--mixed_precision bf16"] if dtype == torch.float32 else []
    if is_apart(device) and not shrunk:  # else what is too small is the main memory
        found += ["--offload_layers", *(["--cpu_offload"] if not cpu_offload else [])]
    return " or ".join(found)


def load_architecture(name: str, *, revision: str | None = None, base_config: str | None = None) -> BaseModel:
    """A base model without its weights: networks of the right shapes on PyTorch's meta device, and the tokenizers.

    Only the small files of its configuration are read, or fetched from the hub.

    name, revision, base_config: as in `load_model`. Raises UserError as there.
    """
    if is_single_file(name):
        folder, family, index_values = _find_config(name, base_config)
    else:
        folder, family, index_values = _find(name, revision, None, weights=False)
    parts = {}
    for part, kind in family.parts().items():
        load = _without_weights(kind) if issubclass(kind, nn.Module) else _loader(part, kind, {})
        parts[part] = _load(part, folder, load)
    model = _assembled(family, name, index_values, parts)
    for network in parts.values():
        if isinstance(network, nn.Module):
            network.requires_grad_(False).eval()
    return model


def _assembled(family: type[BaseModel], name: str, index_values: dict[str, Any], parts: dict[str, Any]) -> BaseModel:
    """The model of these parts. UserError if they do not belong together."""
    model = family(name=name, index_values=index_values, **parts)
    if not model.has_known_noise:
        kind = type(model.scheduler).__name__
        prediction = getattr(model.scheduler.config, "prediction_type", None)
        raise UserError(
            f"{name}: its scheduler ({kind}{f', {prediction}' if prediction else ''}) adds noise in another way than "
            f"{family.title}; such a model cannot be used here"
        )
    model.check()
    return model


def _without_weights(kind: Any) -> Callable[[Path], nn.Module]:
    def load(path: Path) -> nn.Module:
        with torch.device("meta"):
            if hasattr(kind, "load_config"):  # diffusers'
                return kind.from_config(kind.load_config(path, local_files_only=True))
            return kind(kind.config_class.from_pretrained(path, local_files_only=True))

    return load


def check_offloading(device: torch.device | str, quantize_base: str | None) -> None:
    """Raise UserError if layers cannot be left in main memory while the model computes on this device.

    device: where it computes. quantize_base: as in `load_model`.
    """
    if quantize_base not in (None, "float8"):
        raise UserError(
            f"--offload_layers: the layers of --quantize_base {quantize_base} cannot leave the GPU; give "
            "--quantize_base float8, or leave one of the two out"
        )
    if not is_apart(torch.device(device)):
        raise UserError(
            "--offload_layers: there is no GPU with memory of its own here, and all of the model is in main memory; "
            "leave it out"
        )


def family_of(name: str, *, revision: str | None = None, base_config: str | None = None) -> type[BaseModel]:
    """The family of a model, for which no more than its index is read, or fetched from the hub.

    For a single file that is the index of its configuration.

    name, revision, base_config: as in `load_model`. Raises UserError as there.
    """
    if is_single_file(name):
        return _find_config(name, base_config)[1]
    return _read_index(name, _local(name, revision) or _fetch(name, revision, [INDEX]))[0]


def fetch_model(name: str) -> None:
    """Have all files that `load_model` reads of a model on this machine, and load none. Raises UserError as there."""
    if is_single_file(name):
        _find_config(name, None)
    else:
        _find(name, None, None)


def known_device(name: torch.device | str) -> torch.device:
    """The device of that name, such as cpu or cuda:1.

    Raises UserError if it is none's, or if this machine or this build of torch has none such.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: cannot be used ({first_line(error)}); give cpu, or leave it out") from error
    return device


def best_device() -> torch.device | str:
    """This machine's GPU if it has one that can be used, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or "cpu"


def _find(
    name: str, revision: str | None, variant: str | None, *, weights: bool = True
) -> tuple[Path, type[BaseModel], dict[str, Any]]:
    """A model's local folder (as named, bundled with this project, or fetched from the hub into its cache), its family
    and the plain values of its index.

    weights: whether to fetch them, too.
    """
    if folder := _local(name, revision):
        family, index_values = _read_index(name, folder)
        if missing := [part for part in family.parts() if not (folder / part).is_dir()]:
            raise UserError(f"model folder {name} has no {', '.join(missing)}: it must be a whole diffusers model")
        return folder, family, index_values
    family, index_values = _read_index(name, _fetch(name, revision, [INDEX]))
    wanted = [INDEX]
    for part in family.parts():
        of_weights = _weight_patterns(variant) if weights else []
        files = ["*"] if part.startswith("tokenizer") else ["*.json", *of_weights]
        wanted += [f"{part}/{pattern}" for pattern in files]
    folder = _fetch(name, revision, wanted)
    if weights and (plain := _without_variant(folder, family, variant)):
        folder = _fetch(name, revision, [f"{part}/{pattern}" for part in plain for pattern in _weight_patterns(None)])
    if missing := [part for part in family.parts() if not (folder / part).is_dir()]:
        raise UserError(f"model {name} on the hub has no {', '.join(missing)}: it must be a whole diffusers model")
    return folder, family, index_values


def _local(name: str, revision: str | None) -> Path | None:
    """A model's folder on this machine, None if it may be on the hub. UserError if it can be in neither place."""
    if folder := next((path for path in places(name) if path.is_dir()), None):
        if revision:
            raise UserError(
                f"revision {revision}: {name} is a folder here, and folders have no revisions; leave the "
                "revision out, or start where there is no such folder"
            )
        return folder
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"there is no model folder {name}, and it is not the name of a model on the hub")
    return None


def _weight_patterns(variant: str | None) -> list[str]:
    """Patterns for the names of a part's weight files, whole and in pieces.

    Where there is a variant, diffusers and transformers write its name before a piece's number; they once did after it.
    """
    if variant is None:
        return ["*model.safetensors", "*model-*-of-*.safetensors"]
    pieces = [f"*model.{variant}-*-of-*.safetensors", f"*model-*-of-*.{variant}.safetensors"]
    return [f"*model.{variant}.safetensors", *pieces]


def _weight_files(part: Path, variant: str | None) -> list[Path]:
    """The weight files in a part's folder that will be loaded."""
    return [path for pattern in _weight_patterns(variant) for path in part.glob(pattern)]


def _without_variant(folder: Path, family: type[BaseModel], variant: str | None) -> list[str]:
    """The networks that lack a variant which others have, and are loaded without it, as by diffusers."""
    networks = [part for part, kind in family.parts().items() if issubclass(kind, nn.Module)]
    plain = [part for part in networks if not _weight_files(folder / part, variant)]
    return plain if variant and plain != networks else []


def _variants(name: str, folder: Path, family: type[BaseModel], variant: str | None) -> dict[str, str]:
    """The variant of each network that has it. UserError if it is asked for and none has."""
    if not variant:
        return {}
    found = [part for part in family.parts() if _weight_files(folder / part, variant)]
    if not found:
        raise UserError(f"{name} has no weights of the variant {variant}; leave --variant out")
    return dict.fromkeys(found, variant)


def has_variant(name: str, variant: str) -> bool:
    """Whether a model's folder on this machine has weights of the variant.

    name, variant: as in `load_model`.
    """
    return any(_weight_files(place / part, variant) for place in places(name) for part in DENOISERS)


def _stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """The half precision that all weights in the files are in, else float32."""
    try:
        found = {kind for path in files for kind in _dtypes_in(path)}
    except (OSError, SafetensorError):
        return torch.float32  # loading will say what is wrong with it
    return HALVES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _is_converted(path: Path, dtype: torch.dtype) -> bool:
    """Whether the weights in a file become others in main memory: those of the right dtype are mapped from the file."""
    try:
        return not {STORED.get(kind) for kind in _dtypes_in(path)} <= {dtype}
    except (OSError, SafetensorError):
        return False  # loading will say what is wrong with it


def _dtypes_in(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    return {kind for kind in kinds if kind.startswith(("F", "BF"))}  # not numbers of positions


def _find_config(name: str, base_config: str | None) -> tuple[Path, type[BaseModel], dict[str, Any]]:
    """For a single file: the folder with its configuration, its family, and the plain values of its index."""
    wanted = base_config or usual_config(name)
    folder = next((path for path in places(wanted) if path.is_dir()), None)
    if folder is None:
        try:
            folder = _fetch(wanted, None, [INDEX, "*/*.json", "*/*.txt", "*/*.model"])
        except UserError as error:
            raise UserError(
                f"{name} needs the configuration of {wanted}, which could not be fetched ({error}); "
                "give a diffusers folder of the same kind with --base_config"
            ) from error
    family, index_values = _read_index(wanted, folder)
    return folder, family, index_values


def _fetch(name: str, revision: str | None, wanted: list[str]) -> Path:
    silent = why_unreachable()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise UserError(
            f"{name} can be had once its licence is accepted: do that at https://huggingface.co/{name}, make a token "
            "there (Settings, Access Tokens), and give it by `hf auth login` or in HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no model {name} on the hub, or it is private: check the name, or log in by `hf auth login`; or "
            "give the path of a local diffusers folder"
        ) from error
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        why = f"{silent}, and it is not in the cache" if silent else first_line(error)
        raise UserError(
            f"cannot get model {name} from the hub ({why}); check the name and the network, "
            "or give the path of a local diffusers folder"
        ) from error


def _read_index(name: str, folder: Path) -> tuple[type[BaseModel], dict[str, Any]]:
    """The family by the folder's index, and the index's plain values.

    UserError if the index is missing or broken, or the family unknown.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model {name} has no {INDEX}: it must be a whole diffusers model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model {name}: {INDEX} cannot be read ({first_line(error)})") from error
    if not isinstance(index, dict):
        raise UserError(f"model {name}: {INDEX} is not a JSON object")
    plain = {key: value for key, value in index.items() if isinstance(value, bool | int | float | str)}
    return find_family(name, index), {key: value for key, value in plain.items() if not key.startswith("_")}


def _load(part: str, folder: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(folder / part)
    except Exception as error:  # the libraries raise whatever their parsers raise
        no_file = isinstance(error, OSError) and "no file named" in str(error) and ".fp16." not in str(error)
        advice = "; only .safetensors are read: if those are called .fp16.safetensors alone, give --variant fp16"
        raise UserError(
            f"cannot load the {part} in {folder / part}: {first_line(error).rstrip('.')}{advice if no_file else ''}"
        ) from error


def _loader(part: str, kind: Any, weights: dict[str, Any]) -> Callable[[Path], Any]:
    """What reads a part of this class from its folder."""
    if part == "scheduler":
        return _load_scheduler
    if part.startswith("tokenizer"):
        return lambda path: _load_tokenizer(kind, path)
    return lambda path: kind.from_pretrained(path, **weights)


def _load_tokenizer(kind: Any, path: Path) -> Any:
    if not (path / "tokenizer.json").is_file() and not all((path / n).is_file() for n in ("vocab.json", "merges.txt")):
        raise FileNotFoundError("neither tokenizer.json nor vocab.json with merges.txt")  # it would load, empty
    return kind.from_pretrained(path, local_files_only=True)


def _load_scheduler(path: Path) -> SchedulerMixin:
    config = DDPMScheduler.load_config(path, local_files_only=True)  # a dict of plain values, whatever the class
    if not isinstance(config.get("_class_name"), str):
        raise UserError("scheduler_config.json has no _class_name")
    return scheduler_class(config["_class_name"]).from_config(config)
