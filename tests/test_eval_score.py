"""Scoring folders and choosing checkpoints, on tiny random models."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from PIL import Image
from tiny_eval import write_world

from eval import pick_checkpoint, score
from eval.encoders import load_encoders
from eval.pick_checkpoint import pick
from eval.score import score_folder, table
from gsoft_diffusion import UserError
from gsoft_diffusion.config import AdapterConfig, SamplerConfig, TrainingConfig
from gsoft_diffusion.pictures import save_png
from gsoft_diffusion.training import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def encoders(world):
    return load_encoders(str(world / "mini_clip"), str(world / "mini_dino"))


def test_photos_score_one_against_themselves(world, encoders):
    rex = str(world / "subjects" / "rex")
    result = score_folder(rex, rex, encoders, prompt="a sks dog", unique_token="sks")
    assert result["mean"]["clip_nearest"] == pytest.approx(1)
    assert result["mean"]["dino_nearest"] == pytest.approx(1)
    assert result["mean"]["dino"] == pytest.approx((1 + 2 * result["photos"]["dino"]) / 3)  # of 3, one is itself
    alone = score_folder(rex, rex, encoders, prompt="a dog")
    assert result["mean"] == alone["mean"]  # the unique token is left out
    assert "CLIP-T, similarity with the prompt" in table(result)


def test_a_picture_that_is_too_large_is_named(world, encoders, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "0000_a.png")
    with pytest.raises(UserError, match=r"0000_a\.png: too large a picture, make it smaller"):
        score_folder(str(tmp_path), str(world / "subjects" / "rex"), encoders)


def test_captions_whose_token_is_not_known_stay_and_that_is_said(world, encoders):
    rex = str(world / "subjects" / "rex")
    result = score_folder(rex, rex, encoders, prompt="a sks dog")
    assert "CLIP-T compares with the prompts as they are: no unique token is known" in table(result)


def test_prompts_come_from_the_pictures(world, encoders, tmp_path, monkeypatch):
    with Image.open(world / "subjects" / "rex" / "0.png") as image:
        facts = {"prompt": "a zwx dog on the beach", "subjects": [{"unique_token": "zwx"}]}
        save_png(image, tmp_path, "{}_seed0_a.png", 0, facts | {"model": "adapter"})
        save_png(image, tmp_path, "{}_seed0_base_a.png", 0, facts | {"model": "base"})
    Image.new("1", (20_000, 20_000)).save(tmp_path / "contact_sheet_0000.png")  # larger than Pillow opens
    asked = []
    embed_texts = encoders.clip.embed_texts
    monkeypatch.setattr(encoders.clip, "embed_texts", lambda texts: asked.extend(texts) or embed_texts(texts))
    result = score_folder(str(tmp_path), str(world / "subjects" / "rex"), encoders)
    assert [(row["file"], row["prompt"]) for row in result["pictures"]] == [
        ("0000_seed0_a.png", "a zwx dog on the beach")
    ]
    assert asked == ["a dog on the beach"]
    assert result["captions"] == "the prompts without zwx"
    assert result["mean"].keys() >= {"clip_t"}
    assert "left out: 2 contact sheets and pictures of the base model" in table(result)


def test_without_prompts_there_is_no_clip_t(world, encoders):
    rex = str(world / "subjects" / "rex")
    result = score_folder(rex, rex, encoders)
    assert "clip_t" not in result["mean"]
    assert "no CLIP-T" in table(result)


def test_a_single_photo_has_no_ceiling(world, encoders, tmp_path):
    rex = world / "subjects" / "rex"
    shutil.copy(rex / "0.png", tmp_path)
    result = score_folder(str(rex), str(tmp_path), encoders)
    assert result["photos"] == {}
    assert "among each other" not in table(result)


def test_command_line(world, tmp_path, monkeypatch, capsys):
    rex = str(world / "subjects" / "rex")
    arguments = ["score", "--images", rex, "--photos", rex, "--out", str(tmp_path / "scores.json")]
    arguments += ["--clip", str(world / "mini_clip"), "--dino", str(world / "mini_dino")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert score.main() == 0
    assert "miniature CLIP mini_clip" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "scores.json").read_text())["pictures"]) == 3
    with pytest.raises(UserError, match="exists; choose another file"):
        score.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "nowhere" / "scores.json")])
    with pytest.raises(UserError, match="in a folder that does not exist"):
        score.main()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [*arguments[:-6], "--out=~/more.json", *arguments[-4:]])
    assert score.main() == 0
    assert (tmp_path / "more.json").is_file()


@pytest.fixture(scope="module")
def finished_run(world, tmp_path_factory):
    """A training run with two checkpoints and a result."""
    folder = tmp_path_factory.mktemp("runs") / "rex"
    config = TrainingConfig(
        instance_data_dir=str(world / "subjects" / "rex"),
        class_word="dog",
        pretrained_model_name_or_path=str(world / "base"),
        output_dir=str(folder),
        adapter=AdapterConfig(nblocks=4),
        max_train_steps=3,
        train_batch_size=1,
        checkpointing_steps=1,
        num_validation_images=0,
        report_to="none",
        sampler=SamplerConfig(num_inference_steps=2),
    )
    train(config)
    return folder


def test_picker_names_the_checkpoint_of_the_best_balance(finished_run, encoders, tmp_path, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    kept = pick(folder, encoders, "dreambooth", max_prompts=2, images_per_prompt=1)
    result = json.loads((folder / "checkpoint_scores" / "scores.json").read_text())
    assert [row["step"] for row in result["checkpoints"]] == [1, 2, 3]
    best = max(result["checkpoints"], key=lambda row: row["balance"])
    assert result["keep"] == best["step"]
    assert kept.is_file()
    assert (folder / "checkpoint_scores" / "scores.svg").stat().st_size > 1000
    assert (folder / "checkpoint_scores" / "contact_sheet.png").is_file()
    assert "step      1: DINO" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists; remove or rename"):
        pick(folder, encoders, "dreambooth", max_prompts=2, images_per_prompt=1)


def test_picker_asks_by_the_name_that_was_trained(finished_run, encoders, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    settings = (folder / "settings.yaml").read_text()
    unnamed = settings.replace("a photo of a sks dog", "a photo of my dog").replace(
        "unique_token: sks", "unique_token: null"
    )
    (folder / "settings.yaml").write_text(unnamed)
    with pytest.raises(UserError, match=r"settings\.yaml: has no unique_token, which the prompts are made with"):
        pick(folder, encoders, "dreambooth", max_prompts=2, images_per_prompt=1)


def test_picker_needs_checkpoints(finished_run, encoders, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="holds 1 adapters to choose from"):
        pick(folder, encoders, "dreambooth", max_prompts=2, images_per_prompt=1)
    assert pick_checkpoint.FOLDER == "checkpoint_scores"
