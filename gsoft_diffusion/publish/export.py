"""Adapters for other tools: a whole model with the adapter merged in, or the change that it makes, as they take it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from gsoft_diffusion.adapters.file import AdapterFile, read_adapters
from gsoft_diffusion.adapters.identity import public_identity_of
from gsoft_diffusion.adapters.loading import family_of_base, load_base
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.config import ExportConfig
from gsoft_diffusion.config.export import DEFAULT_RANK, default_output
from gsoft_diffusion.foundation.errors import UserError, printable
from gsoft_diffusion.foundation.files import new_places
from gsoft_diffusion.foundation.run_folder import CARD, latest_sheet, run_folder
from gsoft_diffusion.models.families import BaseModel, ZImage
from gsoft_diffusion.models.loading import INDEX, best_device
from gsoft_diffusion.models.original_layout import text_encoder_tensors
from gsoft_diffusion.publish.approximation import Approximation, total_error, write_report
from gsoft_diffusion.publish.full_difference import write_differences
from gsoft_diffusion.publish.low_rank import LoraLayer, approximate, by_module, diffusers_tensors, kohya_tensors
from gsoft_diffusion.publish.metadata import kohya_metadata, modelspec, provenance
from gsoft_diffusion.publish.model_card import model_card

PREVIEW = "preview.png"  # in a merged folder


def export(config: ExportConfig) -> Path:
    """Write the export that the settings describe, completely or not at all, and print a summary. Returns its path.

    Weights are rotated and decomposed in float32, whatever they are stored in, and rounded to `config.precision` at the
    end. Raises UserError if the adapter or its base model cannot be read, the output exists or cannot be written, or a
    number does not fit.
    """
    files = read_adapters(config.adapter)
    strengths = list(config.strengths.values())
    if all(file.changes_nothing or not strength for file, strength in zip(files, strengths, strict=True)):
        raise UserError(f"--adapter {', '.join(config.adapter)}: does not change the base model; nothing is exported")
    rank = config.rank or DEFAULT_RANK
    target = Path(config.output or default_output(files[0].path, config.format, rank))
    sheet = _sheet(files[0]) if strengths == [1.0] else None
    whole = config.format == "diffusers"
    ends = [] if whole else [".md", *([".png"] if sheet else []), *([".csv"] if config.is_change else [])]
    paths = {end: target.with_suffix(end) for end in ends}
    with new_places("--output", target, *paths.values()) as (place, *others):
        places = dict(zip(paths, others, strict=True))
        moved_to, base_config = config.pretrained_model_name_or_path, config.base_config
        family_of_base(files[0], moved_to, base_config=base_config).check_format(config.format)
        model = load_base(files[0], moved_to, variant=config.variant, base_config=base_config, dtype=None)
        if not config.is_change:  # then each layer is made in float32, by itself
            with_room_for(model, getattr(torch, config.precision))
        stack = AdapterStack(model.denoiser, model.text_encoders)
        for adapter in config.adapter:
            stack.load(adapter, adapter, accept_other_base=config.accept_other_base)
        base = public_identity_of(model) if config.accept_other_base else files[0].base_model
        metadata = provenance(files, config.strengths, base)
        of_transformer = not isinstance(model.denoiser, UNet2DConditionModel)
        of_diffusers = config.format in ("diffusers", "diffusers_lora") or (config.format == "diff" and of_transformer)
        metadata |= modelspec(model, files, target.stem, change=config.is_change, of_diffusers=of_diffusers)
        if config.is_change:
            said = _export_change(config, rank, model, stack, metadata, place, places[".csv"])
        else:
            said = _export_merged(config, model, stack, metadata, place)
        card, picture = (place / CARD, place / PREVIEW) if whole else (places[".md"], places.get(".png"))
        shown = (PREVIEW if whole else paths[".png"].name) if sheet else None
        text = model_card(config.format, target.name, files, strengths, model=model, base=base, picture=shown)
        card.write_text(text, "utf-8")
        if sheet and picture:
            shutil.copyfile(sheet, picture)
    print(printable(f"{target}: {said}"))
    if config.format == "diffusers_lora" and isinstance(model.denoiser, UNet2DConditionModel):
        print("note: ComfyUI and Forge read only the text encoders' part of this format; choose kohya_lora or diff")
    if config.format == "kohya_lora" and isinstance(model, ZImage):
        print("note: this is for musubi-tuner; ComfyUI reads diffusers_lora of this model")
    return target


def _sheet(file: AdapterFile) -> Path | None:
    """The last contact sheet of the adapter's run that is not of a later step."""
    return latest_sheet(run_folder(file.path), file.step)


def _export_merged(
    config: ExportConfig, model: BaseModel, stack: AdapterStack, metadata: dict[str, str], place: Path
) -> str:
    """Write the whole model to `place`; returns what it is, in words."""
    stack.use(config.strengths)
    dtype: torch.dtype = getattr(torch, config.precision)
    if config.format == "diffusers":
        write_folder(place, model, dtype)
    else:
        write_tensors(place, rounded(model.original_layout(), dtype), metadata)
    what = "the adapter" if len(config.adapter) == 1 else f"{len(config.adapter)} adapters"
    return f"{model.name} with {what} merged in, {config.precision}"


def _export_change(
    config: ExportConfig,
    rank: int,
    model: BaseModel,
    stack: AdapterStack,
    metadata: dict[str, str],
    place: Path,
    report: Path,
) -> str:
    """Write the change to `place` and the table of its layers to `report`; returns in words what it loses."""
    dtype: torch.dtype = getattr(torch, config.precision)
    layers: Sequence[Approximation]
    if config.format == "diff":
        layers = write_differences(place, model, stack, config.strengths, dtype, metadata)
        what = "full differences"
    else:
        layers = _write_lora(place, config, rank, model, stack, dtype, metadata)
        what = f"LoRA of rank {rank}"
    write_report(report, layers)
    worst = max(layers, key=lambda layer: layer.error)
    return (
        f"{what}, {config.precision}; it loses {100 * total_error(layers):.3g}% of the adapter's change of the "
        f"weights, at most {100 * worst.error:.3g}% in a layer ({worst.name}); all in the .csv beside it"
    )


def _write_lora(
    place: Path,
    config: ExportConfig,
    rank: int,
    model: BaseModel,
    stack: AdapterStack,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> list[LoraLayer]:
    """Write the LoRA; returns its layers."""
    of_kohya = kohya_metadata(model, rank) if config.format == "kohya_lora" else {}
    layers = lora_layers(stack, config.strengths, rank, dtype)
    modules = by_module(layers, stack.layers(config.strengths))
    tensors = kohya_tensors(modules, model.kohya_place) if of_kohya else diffusers_tensors(modules)
    write_tensors(place, rounded(tensors, dtype), metadata | of_kohya)
    return layers


# A whole model


def with_room_for(model: BaseModel, precision: torch.dtype) -> None:
    """Cast networks up, if they have fewer digits than a precision: merged weights are to be rounded to that once.

    model: its networks are changed in place. precision: of the weights to be written.
    """
    for name in model.parts():
        part = getattr(model, name)
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.promote_types(next(part.parameters()).dtype, precision))


def write_folder(folder: Path, model: BaseModel, dtype: torch.dtype) -> None:
    """Write a complete diffusers folder with all weights in one precision.

    folder: is made. model: its networks are cast in place. dtype: of all floating-point weights. Raises UserError if a
    weight is too large for it.
    """
    index: dict[str, object] = {
        "_class_name": model.pipeline,
        "_diffusers_version": diffusers.__version__,
    }
    index |= model.index_values | model.index
    parts = {name: getattr(model, name) for name in model.parts()}
    for network in parts.values():
        if not isinstance(network, nn.Module):
            continue
        for weight, tensor in network.state_dict().items():
            rounded_one(weight, tensor, dtype)  # refuses what does not fit
        nn.Module.to(network, dtype)  # diffusers' own warns of layers that it would keep in float32, and names none
    for name, part in parts.items():
        if isinstance(part, CLIPTextModel | CLIPTextModelWithProjection):
            save_text_encoder(part, folder / name)
        else:
            part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        if isinstance(part, CLIPTokenizer):
            # vocab.json and merges.txt: transformers 5 leaves them out, other readers ask for them
            part.backend_tokenizer.model.save(str(folder / name))
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_text_encoder(text_encoder: CLIPTextModel | CLIPTextModelWithProjection, folder: Path) -> None:
    """Write a text encoder with its weights under the names of `text_encoder_tensors`.

    text_encoder: is not changed. folder: is made.

    transformers itself uses these names only where the model was read from files that had them.
    """
    tensors = text_encoder_tensors(text_encoder)
    text_encoder.save_pretrained(folder, state_dict=tensors, save_original_format=False)


# A LoRA


def lora_layers(stack: AdapterStack, strengths: Mapping[str, float], rank: int, dtype: torch.dtype) -> list[LoraLayer]:
    """The nearest LoRA, layer by layer, to the combined change by the adapters.

    stack: with no adapter in use. strengths: of the adapters to combine, by their names in the stack. rank: of each
    layer. dtype: of the factors.
    """
    total = len(stack.layers(strengths))
    layers = tqdm(stack.composed(strengths), desc="singular values", unit="layer", total=total)
    device = best_device()  # where decompositions take least time
    return [approximate(name, weight.to(device), rotated.to(device), rank, dtype) for name, weight, rotated in layers]


# Files


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point tensors in another precision, the others as they are.

    tensors: by name. dtype: of the results. Raises UserError if a number is too large for it.
    """
    return {name: rounded_one(name, tensor, dtype) for name, tensor in tensors.items()}


def rounded_one(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `rounded`, of one tensor. name: for the message."""
    result = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not result.isfinite().all():
        raise UserError(f"{name} does not fit into {str(dtype).removeprefix('torch.')}: give --precision float32")
    return result


def write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    target: its path. tensors: by name, in any memory layout. metadata: texts by name.
    """
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata)
