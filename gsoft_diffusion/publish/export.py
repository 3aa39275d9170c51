"""Adapters for other tools: a whole model with the adapter merged in, or the change that it makes, as they take it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

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
from gsoft_diffusion.publish.approximation import Approximation, total_error, write_report
from gsoft_diffusion.publish.full_difference import write_differences
from gsoft_diffusion.publish.low_rank import LoraLayer, by_module, diffusers_tensors, kohya_tensors, lora_layers
from gsoft_diffusion.publish.metadata import kohya_metadata, modelspec, provenance
from gsoft_diffusion.publish.model_card import model_card
from gsoft_diffusion.publish.tensor_files import write_tensors
from gsoft_diffusion.publish.whole_model import round_weights, with_room_for, write_folder

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
    dtype: torch.dtype = getattr(torch, config.precision)
    with_room_for(stack.layers(config.strengths).values(), dtype)
    stack.use(config.strengths)
    round_weights(model, dtype)
    if config.format == "diffusers":
        write_folder(place, model)
    else:
        write_tensors(place, model.original_layout(), metadata)
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
    write_tensors(place, tensors, metadata | of_kohya)
    return layers
