"""The families of base models, one file each: the interface between a kind of model and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families.base import BaseModel, Conditioning, chosen, joined, whole_view
from gsoft_diffusion.models.families.flux import Flux
from gsoft_diffusion.models.families.flux2_dev import Flux2Dev
from gsoft_diffusion.models.families.flux2_klein import Flux2Klein
from gsoft_diffusion.models.families.stable_diffusion import StableDiffusion
from gsoft_diffusion.models.families.stable_diffusion_3 import StableDiffusion3
from gsoft_diffusion.models.families.stable_diffusion_xl import StableDiffusionXL
from gsoft_diffusion.models.families.z_image import ZImage

FAMILIES: tuple[type[BaseModel], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    Flux2Klein,
    Flux2Dev,
    ZImage,
)

__all__ = [
    "FAMILIES",
    "BaseModel",
    "Conditioning",
    "Flux",
    "Flux2Dev",
    "Flux2Klein",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "ZImage",
    "chosen",
    "find_family",
    "joined",
    "whole_view",
]

# What does not decide: loaded by other rules, or beside the matter of drawing a picture from a prompt.
UNDECISIVE = ("scheduler", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")


def find_family(name: str, index: Mapping[str, Any]) -> type[BaseModel]:
    """The family of a diffusers model by the classes of its parts in `model_index.json`, which are only compared.

    name: the model's, for the message.
    index: what the file holds: [library, class] for each part, and plain values.

    Raises UserError with the families that there are if it is of none.
    """
    found = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    found = {part: kind for part, kind in found.items() if kind and not part.startswith(UNDECISIVE)}
    for family in FAMILIES:
        wanted = {part: kind.__name__ for part, kind in family.parts().items() if not part.startswith(UNDECISIVE)}
        if found == wanted:
            return family
    parts = ", ".join(f"{part} {kind}" for part, kind in sorted(found.items())) or "no parts"
    titles = "; ".join(family.title for family in FAMILIES)
    raise UserError(f"{name} consists of {parts}: not a model that can be trained here. Supported are {titles}")
