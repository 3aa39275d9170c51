"""A short pretraining of the denoiser, from scenes to a pipeline in a folder."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT_LENGTH, write_tokenizer
from diffusers import StableDiffusionPipeline
from pretended import pretended_gpu
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from pretraining import train_unet
from pretraining.train_vae import build_vae

SCENES, HELD_BACK = 160, 64


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A work folder with what the stages before give; few scenes are held back."""
    monkeypatch.setattr(train_unet, "HELD_BACK", HELD_BACK)
    monkeypatch.setattr(train_unet, "JUDGED", HELD_BACK)
    folder = tmp_path / "work"
    folder.mkdir()
    scenes = np.random.default_rng(0).integers(0, 255, (SCENES, 64, 64, 3), dtype=np.uint8)
    np.save(folder / "scenes.npy", scenes)
    captions = [json.dumps({"caption": f"a dog {number % 7}"}) for number in range(SCENES)]
    (folder / "scenes.jsonl").write_text("\n".join(captions) + "\n")
    build_vae().save_pretrained(folder / "vae")
    vocabulary = write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    return folder


def pretrain(monkeypatch, work: Path, device: str, *arguments: str) -> Path:
    """Run the stage for four steps; returns the folder of its results."""
    out = work / f"results-{device}"
    command = ["train_unet", "--work", work, "--out", out, "--device", device, "--images", 64, "--batch", 16]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--widths", "32", "64", *arguments])
    train_unet.main()
    return out


@contextmanager
def float32(*_):
    """Instead of bfloat16, in which a CPU and a GPU round differently."""
    yield


def test_a_pipeline_comes_out_and_a_finished_training_is_not_repeated(work, monkeypatch):
    out = pretrain(monkeypatch, work, "cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(out / "mini_base")
    assert list(pipeline.unet.config.block_out_channels) == [32, 64]
    (line,) = (out / "unet_loss.csv").read_text().splitlines()
    assert line.startswith("64,")
    pretrain(monkeypatch, work, "cpu")
    assert (out / "unet_loss.csv").read_text().splitlines() == [line]


def test_a_gpu_trains_it_to_the_cpu_s_weights(work, monkeypatch):
    monkeypatch.setattr(train_unet, "fast_autocast", float32)
    on_cpu = pretrain(monkeypatch, work, "cpu")
    with pretended_gpu() as gpu:
        on_gpu = pretrain(monkeypatch, work, "cuda")
    assert gpu.kernels.total() > 1000
    first, second = ((folder / "unet_loss.csv").read_text().split(",") for folder in (on_cpu, on_gpu))
    assert [*map(float, second)] == pytest.approx([*map(float, first)], rel=1e-3)
    kept, expected = (load_file(folder / "unet_kept.safetensors") for folder in (on_gpu, on_cpu))
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-3)


def test_it_goes_on_from_kept_weights_and_their_count(work, monkeypatch):
    first = pretrain(monkeypatch, work, "cpu")
    kept = (first / "unet_kept.safetensors").rename(work / "start.safetensors")
    (first / "unet.pt").unlink()
    pretrain(monkeypatch, work, "cpu", "--start-from", str(kept), "--images", "96")
    assert [line.split(",")[0] for line in (first / "unet_loss.csv").read_text().splitlines()] == ["64", "96"]
