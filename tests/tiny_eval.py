"""Tiny random encoders in the layouts that are read, and a small world to compare methods in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from conftest import write_base, write_tokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from eval.experiment import Experiment
from gsoft_diffusion.scoring.open_clip_layout import save_open_clip

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def tiny_clip(vocabulary: int, activation: str = "quick_gelu") -> CLIPModel:
    torch.manual_seed(0)
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 8,
        "hidden_act": activation,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():  # norms and biases away from 1 and 0, or mixing them up would not show
            parameter += 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter.half())  # survives being stored
    return clip


def write_preprocessor(folder: Path, **changes: object) -> None:
    values = {"size": {"height": 16, "width": 16}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(values | changes))


def write_clip(folder: Path) -> CLIPModel:
    """A tiny random CLIP in open_clip's layout; returns the model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = tiny_clip(write_tokenizer(folder))
    save_open_clip(folder, model, MEAN, STD)
    return model


def write_dino(folder: Path) -> ViTModel:
    """A tiny random vision transformer in transformers' layout; returns the model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    write_preprocessor(folder)
    return model


def write_world(folder: Path) -> Path:
    """A tiny base, tiny encoders, two subjects with three photos each, two prompts."""
    write_base(folder / "base")
    write_clip(folder / "mini_clip")
    write_dino(folder / "mini_dino")
    rng = np.random.default_rng(0)
    for subject in ("rex", "cup"):
        (folder / "subjects" / subject).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "subjects" / subject / f"{number}.png")
    (folder / "subjects" / "subjects.csv").write_text("subject,class_word,kind\nrex,dog,live\ncup,cup,object\n")
    (folder / "prompts.txt").write_text("a {0} {1} on the beach\na red {0} {1}\n")
    return folder


def experiment(world: Path, **changes: object) -> Experiment:
    """A small comparison of two methods in that world."""
    settings = {
        "subjects_dir": str(world / "subjects"),
        "pretrained_model_name_or_path": str(world / "base"),
        "clip": str(world / "mini_clip"),
        "dino": str(world / "mini_dino"),
        "prompts": str(world / "prompts.txt"),
        "methods": ["double_gsoft", "lora"],
        "budgets": ["medium"],
        "learning_rates": {"double_gsoft": [1e-3, 1e-2], "lora": [1e-3]},
        "seeds": 1,
        "sweep_subjects": 1,
        "max_train_steps": 2,
        "train_batch_size": 1,
        "images_per_prompt": 1,
        "base_images": 2,
        "class_images": 1,
        "unrelated_images": 1,
        "sampler": {"num_inference_steps": 2},
    }
    return Experiment.from_dict(settings | changes)


def grid(world: Path, **changes: object) -> Experiment:
    """A small grid in that world: two methods, two seeds, two steps of each training."""
    return experiment(world, **{"grid": True, "curve_every": 1, "seeds": 2, "sweep_subjects": 2} | changes)
