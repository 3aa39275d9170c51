"""Scoring folders and choosing checkpoints, on tiny random models."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_eval import write_world

from eval import pick_checkpoint, score
from eval.pick_checkpoint import pick
from eval.score import score_folder, table
from gsoft_diffusion import UserError
from gsoft_diffusion.config.adapter import AdapterConfig
from gsoft_diffusion.config.concept import Concept
from gsoft_diffusion.config.sampler import SamplerConfig
from gsoft_diffusion.config.training import TrainingConfig
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.sampling.pictures import save_png
from gsoft_diffusion.scoring.encoders import load_encoders
from gsoft_diffusion.training.train import train


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
    monkeypatch.setattr(score, "load_encoders", lambda *arguments: pytest.fail("worked in vain"))
    with pytest.raises(UserError, match="exists and is not overwritten: choose another name with --out"):
        score.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "scores.json" / "below.json")])
    with pytest.raises(UserError, match=r"--out: cannot write .*below\.json"):
        score.main()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("eval.score", "--images nowhere --photos .", "--images nowhere: cannot be read as a folder"),
        ("eval.score", "--images {photos} --photos nowhere", "--photos nowhere: cannot be read as a folder"),
        ("eval.pick_checkpoint", "nowhere", r"nowhere: holds no settings\.yaml; name the output folder"),
    ],
)
def test_folders_are_looked_at_before_encoders_are_fetched(photos, monkeypatch, module, arguments, message):
    main = importlib.import_module(module).main
    monkeypatch.setattr("eval.score.load_encoders", lambda *_: pytest.fail("encoders were fetched"))
    monkeypatch.setattr("sys.argv", [module, *arguments.format(photos=photos).split()])
    with pytest.raises(UserError, match=message):
        main()


def test_paths_of_the_command_line_may_start_at_home(world, tmp_path, monkeypatch):
    """A shell leaves the ~ of --out=~/scores.json to the program."""
    monkeypatch.setenv("HOME", str(world))
    folders = ["--images=~/subjects/rex", "--photos=~/subjects/rex", "--clip=~/mini_clip", "--dino=~/mini_dino"]
    monkeypatch.setattr(sys, "argv", ["score", *folders, "--out=~/scores_at_home.json"])
    assert score.main() == 0
    assert (world / "scores_at_home.json").is_file()


@pytest.mark.parametrize("folder", ["images", "photos"])
def test_pictures_that_are_too_large_are_named(world, encoders, tmp_path, monkeypatch, folder):
    rex = world / "subjects" / "rex"
    images, photos = (shutil.copytree(rex, tmp_path / name) for name in ("images", "photos"))
    Image.new("L", (200, 200)).save(tmp_path / folder / "1.png")
    Image.new("L", (200, 200)).save(images / "contact_sheet_0000.png")  # passed over, whatever its size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(UserError, match=r"1\.png: too large a picture, make it smaller"):
        score_folder(images, photos, encoders)


def trained(world: Path, folder: Path, **settings) -> Path:
    """A run with a checkpoint at every step; returns its folder."""
    common = {
        "pretrained_model_name_or_path": str(world / "base"),
        "output_dir": str(folder),
        "adapter": AdapterConfig(nblocks=4),
        "train_batch_size": 1,
        "checkpointing_steps": 1,
        "num_validation_images": 0,
        "report_to": "none",
        "sampler": SamplerConfig(num_inference_steps=2),
    }
    train(TrainingConfig(**common, **settings))
    return folder


@pytest.fixture(scope="module")
def finished_run(world, tmp_path_factory):
    """A training run with two checkpoints and a result."""
    rex = {"instance_data_dir": str(world / "subjects" / "rex"), "class_word": "dog"}
    return trained(world, tmp_path_factory.mktemp("runs") / "rex", max_train_steps=3, **rex)


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


@pytest.fixture(scope="module")
def run_of_two(world, tmp_path_factory):
    """A training run on two subjects, with a checkpoint and a result."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    concepts = (
        Concept(str(world / "subjects" / "rex"), class_word="dog", unique_token="sks"),
        Concept(str(world / "subjects" / "cup"), class_word="cup", unique_token="zwx"),
    )
    return trained(world, folder, max_train_steps=2, concepts_list=concepts)


def test_picker_judges_each_subject_by_its_own_photos(world, run_of_two, encoders, tmp_path, capsys):
    folder = shutil.copytree(run_of_two, tmp_path / "run")
    pick(folder, encoders, str(world / "prompts.txt"), max_prompts=2, images_per_prompt=1)
    result = json.loads((folder / "checkpoint_scores" / "scores.json").read_text())
    assert result["subjects"].keys() == {"rex", "cup"}
    real = {name: each["photos"]["dino"] for name, each in result["subjects"].items()}
    assert real["rex"] != real["cup"]
    assert result["photos"]["dino"] == pytest.approx(sum(real.values()) / 2)
    for row in result["checkpoints"]:
        assert row["subjects"]["rex"] != row["subjects"]["cup"]
        for name in ("dino", "clip_t", "balance"):
            assert row[name] == pytest.approx((row["subjects"]["rex"][name] + row["subjects"]["cup"][name]) / 2)
    said = capsys.readouterr().out
    assert said.count("    rex: DINO") == 2
    assert said.count("    cup: DINO") == 2


def test_picker_asks_for_each_subject_by_its_own_name(run_of_two, encoders, tmp_path, monkeypatch):
    folder = shutil.copytree(run_of_two, tmp_path / "run")
    asked = []

    def draw(model, jobs, *arguments, **options):
        asked.append(jobs[0][0])
        return generate(model, jobs, *arguments, **options)

    monkeypatch.setattr(pick_checkpoint, "generate", draw)
    pick(folder, encoders, "dreambooth", max_prompts=1, images_per_prompt=1)
    assert [prompt.split()[1] for prompt in asked[:2]] == ["dog", "cup"]  # the base model's
    assert [" ".join(prompt.split()[1:3]) for prompt in asked[2:]] == ["sks dog", "zwx cup"] * 2


def test_picker_names_the_subject_without_a_class_word(run_of_two, encoders, tmp_path):
    folder = shutil.copytree(run_of_two, tmp_path / "run")
    text = (folder / "settings.yaml").read_text()
    (folder / "settings.yaml").write_text(text.replace("class_word: cup", "class_word: null"))
    with pytest.raises(UserError, match=r"settings\.yaml: has no class_word for .*cup, which"):
        pick(folder, encoders, "dreambooth", max_prompts=1, images_per_prompt=1)


def test_picker_says_where_nothing_speaks_for_one(finished_run, encoders, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.setattr("gsoft_diffusion.scoring.metrics.balance", lambda *arguments: 0.0)
    assert "checkpoint-1" in str(pick(folder, encoders, "dreambooth", max_prompts=1, images_per_prompt=1))
    assert "note: all checkpoints have the same balance" in capsys.readouterr().out


def test_picker_that_fails_leaves_nothing(finished_run, encoders, tmp_path, monkeypatch):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    before = set(folder.iterdir())
    monkeypatch.setattr(pick_checkpoint, "save_sheets", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"cannot write .*checkpoint_scores \(disk full"):
        pick(folder, encoders, "dreambooth", max_prompts=1, images_per_prompt=1)
    assert set(folder.iterdir()) == before


def test_picker_asks_by_the_name_that_was_trained(finished_run, encoders, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    settings = (folder / "settings.yaml").read_text()
    unnamed = settings.replace("a photo of a sks dog", "a photo of my dog").replace(
        "unique_token: sks", "unique_token: null"
    )
    (folder / "settings.yaml").write_text(unnamed)
    with pytest.raises(UserError, match=r"settings\.yaml: has no unique_token for .*rex, which the prompts need"):
        pick(folder, encoders, "dreambooth", max_prompts=2, images_per_prompt=1)


def test_picker_needs_checkpoints(finished_run, encoders, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="holds 1 adapters to choose from"):
        pick(folder, encoders, "dreambooth", max_prompts=2, images_per_prompt=1)
