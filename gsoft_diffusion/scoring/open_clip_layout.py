"""The original CLIP architecture in open_clip's files, written from and read into transformers' `CLIPModel`.

open_clip needs torchvision, which not every machine has in a working build. The bundled miniature CLIP has open_clip's
layout, so that open_clip loads it, and this module reads the same files without it.

    open_clip_config.json, open_clip_model.safetensors, and a tokenizer in transformers' layout
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.files import give_usual_modes

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
RENAMED = {  # parts of transformers' names, and what open_clip calls them
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TRANSPOSED = ("text_projection", "visual.proj")
MODEL_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "hf_tokenizer_name"}


def save_open_clip(folder: Path, clip: CLIPModel, mean: list[float], std: list[float]) -> None:
    """Write config and weights, these in half precision. The tokenizer's files are to be put beside them.

    folder: is made. clip: the model, which is not changed.
    mean, std: of the three colours, with which the model was trained to have its pictures normalised.

    Raises ValueError for an architecture that open_clip does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": open_clip_config(clip.config),
        "preprocess_cfg": {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.half().contiguous() for name, tensor in to_open_clip(clip.state_dict()).items()}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    give_usual_modes(folder / WEIGHTS)


def read_open_clip(folder: Path) -> tuple[CLIPModel, CLIPTokenizer, dict[str, Any]]:
    """Model in float32, tokenizer and `preprocess_cfg`. Raises UserError for files that are damaged or do not fit."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        clip = CLIPModel(transformers_config(config["model_cfg"]))
        state = from_open_clip(load_file(folder / WEIGHTS), clip.state_dict())
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        preprocessing = config.get("preprocess_cfg", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: not a CLIP in open_clip's layout ({first_line(error)})") from error
    clip.load_state_dict(state)
    return clip, tokenizer, preprocessing


def is_original_clip(folder: Path) -> bool:
    """Whether the folder's model is one that `read_open_clip` reads; only open_clip itself knows the others."""
    try:
        model = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        known = (MODEL_KEYS, VISION_KEYS, TEXT_KEYS)
        parts = (model, model["vision_cfg"], model["text_cfg"])
        return all(part.keys() <= keys for part, keys in zip(parts, known, strict=True))
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """open_clip's `model_cfg` of a transformers configuration. Raises ValueError for what open_clip does not have."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    if {text.hidden_act, vision.hidden_act} not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(f"open_clip has no CLIP with {text.hidden_act} and {vision.hidden_act}")
    if text.eos_token_id != text.vocab_size - 1:
        raise ValueError("open_clip pools the text at the token with the largest number, which must be the end token")
    if text.intermediate_size != 4 * text.hidden_size or vision.intermediate_size != 4 * vision.hidden_size:
        raise ValueError("the original CLIP's MLPs are four times as wide as the model")
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "hf_tokenizer_name": "in this folder",  # open_clip looks there if there is any name
        },
    }


def transformers_config(model_cfg: Mapping[str, Any]) -> CLIPConfig:
    """The inverse of `open_clip_config`; what is left out has open_clip's default."""
    vision = {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224}
    vision |= model_cfg["vision_cfg"]
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12} | model_cfg["text_cfg"]
    activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    end = text["vocab_size"] - 1
    return CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "patch_size": vision["patch_size"],
            "image_size": vision["image_size"],
            "hidden_act": activation,
        },
        text_config={
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": activation,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    )


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under open_clip's names; its queries, keys and values are one matrix."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        target, part = _open_clip_name(name)
        parts.setdefault(target, {})[part] = tensor.T if target in TRANSPOSED else tensor
    return {
        name: torch.cat([of[0], of[1], of[2]]) if len(of) == 3 else next(iter(of.values()))
        for name, of in parts.items()
    }


def from_open_clip(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names, float32.

    state: open_clip's weights. like: the weights of a `CLIPModel`, whose names and shapes are wanted.

    Raises KeyError or ValueError if they do not fit.
    """
    found = {}
    for name, wanted in like.items():
        source, part = _open_clip_name(name)
        tensor = state[source]
        tensor = tensor.T if source in TRANSPOSED else tensor
        tensor = tensor.chunk(3)[part] if part >= 0 else tensor
        if tensor.shape != wanted.shape:
            raise ValueError(f"{source} has shape {tuple(state[source].shape)}, the configuration asks for another")
        found[name] = tensor.float().contiguous()
    if unknown := state.keys() - {_open_clip_name(name)[0] for name in like}:
        raise ValueError(f"unexpected weights {', '.join(sorted(unknown))}")
    return found


def _open_clip_name(name: str) -> tuple[str, int]:
    """open_clip's name for transformers' `name`, and which third of it: 0, 1, 2, or -1 for the whole."""
    for ours, theirs in RENAMED.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.|$)", rf"\g<1>{theirs}", name)
    if found := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name):
        return f"{found[1]}.in_proj_{found[3]}", "qkv".index(found[2])
    return name, -1
