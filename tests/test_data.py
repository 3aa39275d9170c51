"""What `data/` promises: subjects with words, prompt lists, and a base that stock diffusers loads."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

DATA = Path(__file__).parent.parent / "data"
LIMIT = 48 * 2**20  # bytes, of the miniature base and the encoders that judge it


def test_subjects_have_pictures_and_words():
    with (DATA / "subjects" / "subjects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 6
    for row in rows:
        pictures = sorted((DATA / "subjects" / row["subject"]).glob("*.png"))
        assert 4 <= len(pictures) <= 5
        assert all(Image.open(path).size == (64, 64) for path in pictures)
        assert row["class_word"].isalpha()
        assert row["kind"] in ("live", "object")


@pytest.mark.parametrize("name", ["objects", "live_subjects"])
def test_dreambooth_prompt_lists_are_whole(name):
    prompts = (DATA / "prompts" / f"{name}.txt").read_text().splitlines()
    assert len(prompts) == 25
    assert all("{0} {1}" in prompt for prompt in prompts)


def test_base_and_encoders_are_small_and_the_base_has_stable_diffusions_files():
    base = DATA / "mini_base"
    files = [
        path for name in ("mini_base", "mini_clip", "mini_dino") for path in (DATA / name).rglob("*") if path.is_file()
    ]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "model_index.json", "scheduler/scheduler_config.json"):
        assert (base / name).is_file()


@pytest.mark.slow
def test_base_loads_in_stock_diffusers_and_draws_the_place_that_the_prompt_names():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DATA / "mini_base")
    pipeline.set_progress_bar_config(disable=True)
    prompts = [
        "a photo of a dog in the water",
        "a photo of a dog in the desert",
        "a photo of a dog on a red background",
    ]
    seeds = [torch.Generator().manual_seed(0) for _ in prompts]
    images = pipeline(prompts, num_inference_steps=12, guidance_scale=3.0, generator=seeds, output_type="np").images
    border = np.concatenate([images[:, :4].reshape(3, -1, 3), images[:, -4:].reshape(3, -1, 3)], axis=1).mean(1)
    water, desert, red = border
    assert water[2] > water[0] + 0.2  # blue over red
    assert desert[0] > desert[2] + 0.2
    assert red[0] > red[1] + 0.3
    assert red[0] > red[2] + 0.3
