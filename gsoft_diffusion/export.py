"""Adapters for other tools: a whole model with the adapter merged in, or a LoRA that comes near it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from gsoft_diffusion.adapter_file import AdapterFile, load_adapter, read_adapter
from gsoft_diffusion.config import ExportConfig
from gsoft_diffusion.errors import UserError, first_line
from gsoft_diffusion.inject import find_attentions, find_clip_attentions, find_linears
from gsoft_diffusion.lora import LoraLayer, approximate, diffusers_tensors, kohya_tensors, total_error
from gsoft_diffusion.models import PARTS, Models, load_base
from gsoft_diffusion.original_layout import is_open_clip, original_layout
from gsoft_diffusion.projection import GSOFTProjection

DEFAULT_RANK = 64
MERGED_NAMES = {"diffusers": "merged", "checkpoint": "merged.safetensors"}
LORA_LAYOUTS = {"diffusers_lora": diffusers_tensors, "kohya_lora": kohya_tensors}


def export(config: ExportConfig) -> Path:
    """Write what the settings ask for, whole or not at all, and say how it went. Returns its path.

    Weights are rotated and decomposed in float32 and rounded to `config.precision` at the end. Raises UserError if the
    adapter or its base model cannot be read, the output exists or cannot be written, or a number does not fit.
    """
    file = read_adapter(config.adapter)
    rank = config.rank or DEFAULT_RANK
    name = f"{config.format}_rank{rank}.safetensors" if config.is_lora else MERGED_NAMES[config.format]
    target = Path(config.output or Path(config.adapter).parent / name)
    report = target.with_suffix(".csv")  # of a LoRA
    for path in (target, report) if config.is_lora else (target,):
        refuse_existing(path)
    dtype: torch.dtype = getattr(torch, config.precision)
    models = load_base(file, config.pretrained_model_name_or_path)
    if config.is_lora:
        layers = lora_layers(models, file, rank, dtype)
        tensors = {name: tensor for layer in layers for name, tensor in LORA_LAYOUTS[config.format](layer).items()}
        metadata = kohya_metadata(models, rank) if config.format == "kohya_lora" else {}
        write_tensors(target, rounded(tensors, dtype), provenance(file) | metadata)
        write_report(report, layers)
        worst = max(layers, key=lambda layer: layer.error)
        print(
            f"{target}: LoRA of rank {rank}, {config.precision}; it loses {total_error(layers):.1%} of the adapter's "
            f"change of the weights, at most {worst.error:.1%} in a layer ({worst.name}); all in {report}"
        )
    else:
        adapter, _ = load_adapter(file.path, models.unet, [models.text_encoder])
        adapter.merge()
        if config.format == "diffusers":
            write_folder(target, models, dtype)
        else:
            weights = original_layout(models.unet, models.vae, models.text_encoder)
            write_tensors(target, rounded(weights, dtype), provenance(file))
        print(f"{target}: {models.name} with the adapter merged in, {config.precision}")
    return target


# A whole model


def write_folder(target: Path, models: Models, dtype: torch.dtype) -> None:
    """Write a complete diffusers folder with text encoder, VAE and UNet in `dtype` (the models are cast in place)."""
    index: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }
    for model in (models.text_encoder, models.vae, models.unet):
        rounded(model.state_dict(), dtype)  # refuses what does not fit
        nn.Module.to(model, dtype)  # diffusers' own warns of layers that it would keep in float32, and names none
    with new(target) as folder:
        for name in PARTS:
            part = getattr(models, name)
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        # vocab.json and merges.txt: transformers 5 leaves them out, other readers ask for them
        models.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# A LoRA


@torch.no_grad()
def lora_layers(models: Models, file: AdapterFile, rank: int, dtype: torch.dtype) -> list[LoraLayer]:
    """The nearest LoRA, layer by layer, to what the adapter does to its base model."""
    text_encoders = [models.text_encoder]
    linears = find_linears(find_attentions(models.unet), find_clip_attentions(file.config.text_encoder, text_encoders))
    adapter, _ = load_adapter(file.path, models.unet, text_encoders)
    layers = []
    for name, linear in tqdm(linears.items(), desc="singular values", unit="layer"):
        projection = adapter.get_submodule(name)
        assert isinstance(projection, GSOFTProjection)
        rotated = projection.rotated_weight(linear.weight)
        layers.append(approximate(name, linear.weight, rotated, rank, dtype))
    return layers


def write_report(target: Path, layers: Sequence[LoraLayer]) -> None:
    """A table of the layers: name, `change` and `error` as in `LoraLayer`."""
    with new(target) as path, path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["layer", "change", "error"])
        table.writerows([layer.name, f"{layer.change:.3e}", f"{layer.error:.3e}"] for layer in layers)


def kohya_metadata(models: Models, rank: int) -> dict[str, str]:
    """What web UIs read to tell which Stable Diffusion a LoRA is for, and how large it is."""
    sizes = {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return {"ss_network_module": "networks.lora", "ss_v2": str(is_open_clip(models.text_encoder))} | sizes


# Files


def provenance(file: AdapterFile) -> dict[str, str]:
    """Metadata of an exported file: its base model, and the prompts that call the subject."""
    origin = {"base_model": asdict(file.base_model), "prompts": file.prompts}
    return {"format": "pt", "gsoft_diffusion": json.dumps(origin)}


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point tensors in `dtype`, the others as they are. UserError if a number is too large for it."""
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not result[name].isfinite().all():
            raise UserError(f"{name} does not fit into {str(dtype).removeprefix('torch.')}: give --precision float32")
    return result


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with new(target) as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def refuse_existing(path: Path) -> None:
    """UserError if there is something at this path already."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists and is not written over: choose another name with --output")


@contextmanager
def new(target: Path) -> Iterator[Path]:
    """A place beside `target` for writing, which gets its name at the end of the block and vanishes on an error."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        refuse_existing(target)  # not even what came while this was written
        unfinished.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {first_line(error)}") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        elif unfinished.exists():
            unfinished.unlink()
