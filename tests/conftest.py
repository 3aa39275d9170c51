"""Shared fixtures: a tiny Stable Diffusion v1 checkpoint with random weights, and a folder of photos."""

from __future__ import annotations

# isort: off
import gsoft_diffusion  # noqa: F401 - first: beside a CPU build of torch it makes torchvision importable
# isort: on

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import constants
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel

from gsoft_diffusion.foundation import hub_access

TEXT_LENGTH = 48  # on purpose neither 32 nor 77
PIXELS = 32  # what the tiny UNet was "made for": 16 latent pixels, VAE factor 2


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> int:
    """Write vocab.json and merges.txt of a CLIP tokenizer that knows single letters; returns the vocabulary's size."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
    return len(tokens)


def write_base(folder: Path, prediction_type: str = "v_prediction") -> Path:
    """Write a tiny random text-to-image model in Stable Diffusion v1's folder layout."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=PIXELS,
        scaling_factor=0.5,
    )
    unet = UNet2DConditionModel(
        sample_size=PIXELS // 2,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    for name, part in (("text_encoder", text_encoder), ("vae", vae), ("unet", unet), ("scheduler", scheduler)):
        part.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session", params=["v_prediction", "epsilon"])
def any_base(request, tmp_path_factory) -> Path:
    """The tiny base, once for each way of predicting. Read only."""
    return write_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The tiny base with v-prediction. Read only: write your own with `write_base` to change it."""
    return write_base(tmp_path_factory.mktemp("base") / "v_prediction")


def write_photos(folder: Path) -> Path:
    """Write four noisy pictures of different shapes and one text file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate([(40, 40), (64, 40), (40, 64), (33, 32)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(autouse=True)
def hub_is_asked_anew(monkeypatch):
    """What one test finds of the hub is nothing to the next."""
    hub_access.attempt.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))


@pytest.fixture(autouse=True)
def accelerate_chooses_anew():
    """The device and the precision that one test trains with are nothing to the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of photos, as `write_photos` makes it."""
    return write_photos(tmp_path / "photos")
