"""Photos as people have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import batches

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.config import Concept, TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.sampling.pictures import save_png
from gsoft_diffusion.training.subjects import instance_photos
from gsoft_diffusion.training.train import train


def test_a_crop_of_photos_that_need_none_is_said(config, tmp_path, capfd):
    square = tmp_path / "square"
    square.mkdir()
    for index in range(2):
        Image.new("RGB", (40, 40), "red").save(square / f"{index}.png")
    train(replace(config, center_crop=True, instance_data_dir=str(square), output_dir=str(tmp_path / "square-run")))
    assert "--center_crop has no effect" in capfd.readouterr().out
    train(replace(config, center_crop=True))
    assert "--center_crop" not in capfd.readouterr().out


def test_captions_become_prompts(config, monkeypatch, capfd):
    (Path(config.instance_data_dir) / "1.txt").write_text("{0} in the snow")
    run, seen = batches(replace(config, with_prior_preservation=True, num_class_images=2), monkeypatch)
    assert run.dataset.prompts == ["a photo of a sks dog", "sks in the snow", "a photo of a dog"]
    drawn = torch.cat([batch["prompts"][batch["prompt_of"]] for batch in seen])
    assert set(drawn.tolist()) == {0, 1, 2}
    assert torch.equal(drawn == 2, torch.cat([batch["is_prior"] for batch in seen]))
    assert "subject: 4 pictures, 1 with captions; left out: notes.txt" in capfd.readouterr().out


@pytest.mark.parametrize("cache_latents", [True, False])
def test_aspect_buckets(config, monkeypatch, capfd, cache_latents):
    config = replace(config, aspect_buckets=True, with_prior_preservation=True, num_class_images=2)
    config = replace(config, max_train_steps=8, cache_latents=cache_latents)
    _, seen = batches(config, monkeypatch)
    assert "sizes: 32×32 (2), 40×24 (1), 24×40 (1)" in capfd.readouterr().out
    shapes = {tuple(batch["noise"].shape) for batch in seen}
    assert shapes == {(4, 4, 16, 16), (4, 4, 12, 20), (4, 4, 20, 12)}


def test_masks_that_are_not_used_and_not_there_are_said(config, capfd):
    with pytest.raises(UserError, match=r"--unmasked_weight 0\.1: no photo has a mask"):
        train(replace(config, unmasked_weight=0.1))
    Image.linear_gradient("L").resize((40, 40)).save(Path(config.instance_data_dir) / "0-masklabel.png")
    train(config)
    assert "note: masks are not used" in capfd.readouterr().out


def test_captions_that_do_not_name_the_subject_are_said(config, capfd):
    for name, caption in (("0", "a sks dog asleep"), ("1", "a dog in the snow"), ("2", "sks in the snow")):
        (Path(config.instance_data_dir) / f"{name}.txt").write_text(caption)
    train(replace(config, max_train_steps=1))
    printed = capfd.readouterr().out
    assert (
        'note: the unique token "sks" is not in the captions of 1.png; these captions do not name the subject'
        in printed
    )
    assert (
        'note: the class word "dog" is not in the captions of 2.png; these captions do not name the subject' in printed
    )


def test_a_caption_with_the_place_of_a_name_that_is_not_known_is_refused(config):
    (Path(config.instance_data_dir) / "1.txt").write_text("a {0} {1} and a {2} {3}")
    with pytest.raises(UserError, match=r"1\.png: its caption: .* \{2\} stands for subject 2, but there are 1"):
        train(config)


def test_several_subjects_in_one_run(config, monkeypatch, tmp_path, capfd):
    mugs = tmp_path / "mugs"
    mugs.mkdir()
    Image.new("RGB", (40, 40), "red").save(mugs / "0.png")
    Image.new("RGB", (40, 40), "green").save(mugs / "1.png")
    concepts = (Concept(config.instance_data_dir, "dog"), Concept(str(mugs), "mug", "zwx"))
    config = replace(config, instance_data_dir="", class_word=None, concepts_list=concepts)
    config = replace(config, with_prior_preservation=True, num_class_images=2, max_train_steps=6)
    run, seen = batches(config, monkeypatch)
    assert run.dataset.prompts == [f"a photo of a {name}" for name in ("sks dog", "zwx mug", "dog", "mug")]
    drawn = torch.cat([batch["prompts"][batch["prompt_of"]] for batch in seen])
    assert torch.bincount(drawn).tolist() == [8, 4, 6, 6]  # two epochs of the photos, three of the class images
    printed = capfd.readouterr().out
    assert "subject a zwx mug: 2 pictures" in printed
    assert "class, a photo of a mug: 2 pictures" in printed
    file = read_adapter(Path(config.output_dir or "") / "adapter.safetensors")
    assert [subject["unique_token"] for subject in file.subjects] == ["sks", "zwx"]
    assert str(tmp_path) not in str(file.training)


def in_folders(config: TrainingConfig, first: str, second: str) -> TrainingConfig:
    """Two subjects whose photos are in these folders."""
    concepts = (Concept(first, "dog"), Concept(second, "mug", "zwx"))
    return replace(config, instance_data_dir="", class_word=None, concepts_list=concepts).resolved()


def test_a_photo_of_two_subjects_is_refused(config, tmp_path):
    inside = Path(config.instance_data_dir) / "3_mug"
    inside.mkdir()
    Image.effect_noise((40, 40), 50).save(inside / "mug.png")
    with pytest.raises(
        UserError, match=r"mug\.png: is in the folders of two subjects, .*photos and .*photos/3_mug; give each"
    ):
        instance_photos(in_folders(config, config.instance_data_dir, str(inside)), print)


def test_copies_of_photos_are_said(config, tmp_path, capsys):
    mugs = tmp_path / "mugs"
    mugs.mkdir()
    (mugs / "x.png").write_bytes((Path(config.instance_data_dir) / "0.png").read_bytes())
    instance_photos(in_folders(config, config.instance_data_dir, str(mugs)), print)
    said = f"note: {mugs}/x.png is the same picture as {config.instance_data_dir}/0.png, so it counts twice"
    assert said in capsys.readouterr().out


def test_names_of_photos_do_not_steer_a_terminal(config, capsys):
    """Photos may come from anywhere."""
    folder = Path(config.instance_data_dir)
    first = (folder / "0.png").read_bytes()
    Image.effect_noise((40, 40), 50).save(folder / "\x1b[2Ja.png")
    (folder / "\x1b[2Ja.txt").write_text("a photo of an animal")  # without the subject's name
    (folder / "\x1b[2Jb.png").write_bytes(first)  # a copy
    train(replace(config, resolution=64))  # for which all are small
    said = capsys.readouterr().out
    shown = "\N{REPLACEMENT CHARACTER}[2J"
    assert f"is not in the captions of {shown}a.png" in said
    assert f"0.png is the same picture as {folder}/{shown}b.png" in said
    assert f"so enlarged and soft: {shown}a.png" in said
    assert "\x1b" not in said


def test_a_caption_that_names_another_subject_only_is_refused(config, tmp_path):
    mugs = tmp_path / "mugs"
    mugs.mkdir()
    Image.effect_noise((40, 40), 50).save(mugs / "mug.png")
    given = in_folders(config, config.instance_data_dir, str(mugs))
    (mugs / "mug.txt").write_text("a sks dog and a zwx mug")
    assert [len(photos) for photos in instance_photos(given, print).values()] == [4, 1]
    (mugs / "mug.txt").write_text("a sks dog")
    with pytest.raises(
        UserError, match=r'mug\.png: its caption names "sks", the subject in .*, and not "zwx"; correct'
    ):
        instance_photos(given, print)


def test_a_class_word_that_the_prompt_does_not_have_is_said(config, capsys):
    instance_photos(replace(config, instance_prompt="a photo of a zwx cat").resolved(), print)
    assert 'note: the class word "dog" is not in the instance prompt' in capsys.readouterr().out


def test_drawn_pictures_among_the_photos_are_said(config, capsys):
    save_png(Image.effect_noise((40, 40), 50), Path(config.instance_data_dir), "{}.png", 7, {"prompt": "a dog"})
    instance_photos(config.resolved(), print)
    assert "subject: 5 pictures, 1 drawn by this program and not photographed" in capsys.readouterr().out


def test_other_words_of_kohyas_folders_are_said(config, capsys):
    inside = Path(config.instance_data_dir) / "10_zwx dog"
    Path(config.instance_data_dir, "0.png").rename((inside.mkdir() or inside) / "0.png")
    instance_photos(config.resolved(), print)
    assert (
        'say "zwx dog"; photos there without a caption are trained as "a photo of a sks dog"' in capsys.readouterr().out
    )
    inside.rename(inside.with_name("10_Sks dog"))
    instance_photos(config.resolved(), print)
    assert "nevertheless" not in capsys.readouterr().out


def test_a_subjects_photo_among_the_class_images_is_refused(config, tmp_path):
    own = tmp_path / "class"
    own.mkdir()
    (own / "copy.png").write_bytes((Path(config.instance_data_dir) / "1.png").read_bytes())
    config = replace(config, with_prior_preservation=True, class_data_dir=str(own), num_class_images=1)
    with pytest.raises(
        UserError, match=r"copy\.png: is the same picture as the photo .*1\.png; take it out of the class images"
    ):
        train(config)


def test_captions_of_class_images_take_the_class_word(config, tmp_path, monkeypatch):
    drawn = tmp_path / "classes"
    drawn.mkdir()
    for number in range(2):
        Image.new("RGB", (40, 40), (number, 80, 200)).save(drawn / f"{number}.png")
    (drawn / "0.txt").write_text("a {1} in the snow")
    config = replace(
        config, class_word="a dog", with_prior_preservation=True, class_data_dir=str(drawn), num_class_images=2
    )
    run, _ = batches(config, monkeypatch)
    assert {"a dog in the snow", "a photo of a dog"} < set(run.dataset.prompts)
    (drawn / "0.txt").write_text("a {0} {1} in the snow")
    with pytest.raises(UserError, match=r"0\.png: its caption: .*\{0\} cannot be filled in"):
        train(replace(config, output_dir=f"{config.output_dir}-again"))


def test_class_images_that_are_not_used_are_said(config, tmp_path, capfd):
    own = tmp_path / "class"
    own.mkdir()
    for number in range(9):
        image = Image.effect_noise((40, 40), 50 + number)
        image.putalpha(image.copy())
        image.save(own / f"{number}.png")
    config = replace(config, with_prior_preservation=True, class_data_dir=str(own), num_class_images=7)
    train(replace(config, max_train_steps=1))
    printed = capfd.readouterr().out
    assert "class: 7 pictures; 2 more than are asked for, which are not used" in printed  # nor is there a word of masks
    assert "note: this run is too short for 5 of its class images" in printed
