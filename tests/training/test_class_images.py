from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from other_process import held
from PIL import Image

from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.config import SamplerConfig, TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.photos.folder import is_blank
from gsoft_diffusion.sampling.generation import Sample
from gsoft_diffusion.training import class_images
from gsoft_diffusion.training.class_images import class_images_folder, ensure_class_images


@pytest.fixture
def config(base, photos, tmp_path) -> TrainingConfig:
    return TrainingConfig(
        str(photos),
        class_word="dog",
        output_dir=str(tmp_path / "runs" / "dog"),
        pretrained_model_name_or_path=str(base),
        with_prior_preservation=True,
        num_class_images=5,
        sample_batch_size=2,
        sampler=SamplerConfig(num_inference_steps=2),
    ).resolved()


@pytest.fixture
def model(base):
    return load_model(str(base))


def test_as_many_as_asked_for_and_then_never_again(config, model, monkeypatch):
    folder = ensure_class_images(config.concepts[0], config, model, identity_of(model))
    assert folder.parent == Path(config.output_dir or "").parent / "class_images"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"seed{seed:06d}.png" for seed in range(5)]
    monkeypatch.setattr(class_images, "generate", lambda *a, **k: pytest.fail("drew again"))
    assert ensure_class_images(config.concepts[0], config, model, identity_of(model)) == folder


def test_missing_ones_are_drawn_with_new_seeds(config, model):
    folder = ensure_class_images(config.concepts[0], config, model, identity_of(model))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ensure_class_images(config.concepts[0], replace(config, num_class_images=7), model, identity_of(model))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.items() <= after.items()
    assert len(after) == len(set(after.values())) == 7


def test_a_second_run_waits_for_the_first_and_takes_what_it_drew(config, model, monkeypatch, capsys):
    folder = class_images_folder(config.concepts[0], config, identity_of(model))
    monkeypatch.setattr(class_images, "generate", lambda *a, **k: pytest.fail("drew again"))
    draws = (
        "from PIL import Image; "
        "[Image.effect_noise((32, 32), 50).save(f'{sys.argv[1]}/seed{i:06d}.png') for i in range(5)]; "
        "Path(sys.argv[1], '.seed000005.png.1.tmp').touch()"
    )
    with held(folder, 1, draws) as number:
        assert ensure_class_images(config.concepts[0], config, model, identity_of(model)) == folder
    assert f"waiting for class images that another run (process {number} on " in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [f"seed{seed:06d}.png" for seed in range(5)]


def test_hidden_files_do_not_count(config, model):
    folder = class_images_folder(config.concepts[0], config, identity_of(model))
    folder.mkdir(parents=True)
    (folder / "._seed000000.png").write_bytes(b"")
    ensure_class_images(config.concepts[0], config, model, identity_of(model))
    assert len(list(folder.glob("seed*.png"))) == 5


def test_the_folder_depends_on_what_decides_the_pictures_and_on_nothing_else(config, model):
    identity = identity_of(model)

    def folder(identity=identity, **changes):
        changed = replace(config, **changes)
        return class_images_folder(changed.concepts[0], changed, identity)

    assert folder() == folder(max_train_steps=7, instance_data_dir="other", num_class_images=9)
    others = {
        folder(),
        folder(class_prompt="a cat"),
        folder(sampler=SamplerConfig(num_inference_steps=3)),
        folder(resolution=48),
        folder(identity=replace(identity, fingerprint="another")),
    }
    assert len(others) == 5


def scripted(images):
    """A stand-in for `generate` that yields the given pictures, one for each job, and black ones after them."""

    def generate(model, jobs, *arguments, **options):
        for number, (prompt, seed) in enumerate(jobs):
            yield Sample(prompt, seed, images[number] if number < len(images) else Image.new("RGB", (8, 8)))

    return generate


def test_broken_pictures_are_drawn_again(config, model, monkeypatch):
    good = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    black = Image.new("RGB", (8, 8))
    monkeypatch.setattr(class_images, "generate", scripted([good, black, good, good, black, good, good]))
    folder = ensure_class_images(config.concepts[0], config, model, identity_of(model))
    assert sorted(int(path.stem[4:]) for path in folder.iterdir()) == [0, 2, 3, 5, 6]


def test_a_model_that_only_draws_black_is_an_error(config, model, monkeypatch):
    monkeypatch.setattr(class_images, "generate", scripted([]))
    with pytest.raises(UserError, match="5 class images came out in one colour"):
        ensure_class_images(config.concepts[0], config, model, identity_of(model))


@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_one_colour_is_broken(colour):
    image = Image.new("RGB", (8, 8), colour)
    assert is_blank(image)
    image.putpixel((3, 3), (1, 2, 3))
    assert not is_blank(image)


def test_own_class_images_are_used_and_completed(config, model, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for name in ("a.jpg", "b.png", "c.png"):
        Image.new("RGB", (8, 8), "red").save(own / name)
    given = replace(config, class_data_dir=str(own))
    assert ensure_class_images(given.concepts[0], replace(given, num_class_images=2), model, identity_of(model)) == own
    assert len(list(own.iterdir())) == 3
    assert "of yours" not in capsys.readouterr().out
    ensure_class_images(given.concepts[0], given, model, identity_of(model))
    assert f"note: {own} has 3 pictures of yours; 2 are drawn beside them" in capsys.readouterr().out
    assert sorted(path.name for path in own.iterdir()) == [
        "a.jpg",
        "b.png",
        "c.png",
        "seed000000.png",
        "seed000001.png",
    ]


def test_pictures_for_another_prompt_or_by_another_base_are_refused(config, model, tmp_path):
    given = replace(config, class_data_dir=str(tmp_path / "own"), num_class_images=2)
    identity = identity_of(model)
    ensure_class_images(given.concepts[0], given, model, identity)
    before = sorted((tmp_path / "own").iterdir())
    cats = replace(given, class_prompt="a photo of a cat", num_class_images=3)
    with pytest.raises(
        UserError, match=r'seed000000\.png: was drawn for "a photo of a dog" and not for "a photo of a cat"'
    ):
        ensure_class_images(cats.concepts[0], cats, model, identity)
    with pytest.raises(UserError, match=r"seed000000\.png: was drawn by another base model"):
        ensure_class_images(given.concepts[0], given, model, replace(identity, fingerprint="another"))
    assert sorted((tmp_path / "own").iterdir()) == before
    ensure_class_images(given.concepts[0], given, model, identity)


def test_class_images_may_be_in_a_folder_as_kohya_names_them(config, model, tmp_path):
    inside = tmp_path / "own" / "1_dog"
    inside.mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (8, 8), "red").save(inside / f"{number}.png")
    given = replace(config, class_data_dir=str(tmp_path / "own"))
    ensure_class_images(given.concepts[0], given, model, identity_of(model))
    assert list((tmp_path / "own").iterdir()) == [inside]


@pytest.mark.parametrize("inside", ["", "/", "/1_dog"])
def test_the_subjects_folder_is_refused(config, model, inside):
    given = replace(config, class_data_dir=config.instance_data_dir + inside)
    with pytest.raises(UserError, match=r"--class_data_dir .*the folder of a subject's photos"):
        ensure_class_images(given.concepts[0], given, model, identity_of(model))


def test_a_folder_that_cannot_be_made(config, model, tmp_path):
    (tmp_path / "file").write_text("x")
    given = replace(config, class_data_dir=str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match="--class_data_dir"):
        ensure_class_images(given.concepts[0], given, model, identity_of(model))
