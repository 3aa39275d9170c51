"""What exported files say of themselves: their origin, and what other programs show of models and LoRAs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.adapters.file import AdapterFile
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.noise import predicts_velocity
from gsoft_diffusion.publish.model_card import public_base


def provenance(files: Sequence[AdapterFile], strengths: Mapping[str, float], base: BaseModelIdentity) -> dict[str, str]:
    """Metadata of an exported file: its base model, and the prompts that call the subjects.

    files: the adapters in it. strengths: by adapter, in the same order. base: their base model, or the one that was
    taken for it.

    Returns texts by name, as safetensors takes them; no folder of this machine is in them.
    """
    prompts = files[0].prompts if len(files) == 1 else {"subjects": [one for file in files for one in file.subjects]}
    base_model = asdict(base) | {"name": public_base(base.name)[1]}
    origin = {"base_model": base_model, "prompts": prompts, "strengths": list(strengths.values())}
    return {"format": "pt", "gsoft_diffusion": json.dumps(origin)}


def kohya_metadata(model: BaseModel, rank: int) -> dict[str, str]:
    """What web UIs read to tell what a LoRA is for, and how large it is.

    model: the base model. rank: of the LoRA; its alpha is the same.
    """
    sizes = {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return {"ss_network_module": "networks.lora"} | sizes | model.kohya_metadata()


def modelspec(
    model: BaseModel, files: Sequence[AdapterFile], title: str, *, change: bool, of_diffusers: bool
) -> dict[str, str]:
    """Metadata by the ModelSpec standard (https://github.com/Stability-AI/ModelSpec), from which programs tell what a
    file is for and show the words that call the subject.

    model: the base model. files: the adapters in the file. title: what people call it. change: whether it
    holds a change of weights, which programs load as a LoRA, and no whole model. of_diffusers: whether weights have
    diffusers' names, and not those of the family's original code. Returns texts by name.
    """
    velocity = predicts_velocity(model.scheduler)
    prediction = {"modelspec.prediction_type": "v" if velocity else "epsilon"} if hasattr(model, "unet") else {}
    called = [
        f"{it.get('unique_token', '')} {it.get('class_word', '')}".strip() for one in files for it in one.subjects
    ]
    triggers = {"modelspec.trigger_phrase": ", ".join(called)} if all(called) else {}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": model.architecture + ("/lora" if change else ""),
        "modelspec.implementation": "diffusers" if of_diffusers else model.original_code,
        "modelspec.title": title,
        "modelspec.resolution": f"{model.resolution}x{model.resolution}",
        **triggers,
        **prediction,
    }
