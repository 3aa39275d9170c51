"""The encoders: layouts, preprocessing, identity; open_clip's own answers where it is installed."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_eval import MEAN, STD, tiny_clip, write_clip, write_dino, write_preprocessor
from transformers import CLIPModel, ViTModel

from gsoft_diffusion import UserError
from gsoft_diffusion.scoring import encoders
from gsoft_diffusion.scoring.encoders import Preprocessing, load_clip, load_dino, load_encoders
from gsoft_diffusion.scoring.open_clip_layout import (
    from_open_clip,
    is_original_clip,
    open_clip_config,
    to_open_clip,
    transformers_config,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny random CLIP in open_clip's layout, and the model itself."""
    folder = tmp_path_factory.mktemp("encoders") / "mini_clip"
    return folder, write_clip(folder)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "mini_dino"
    return folder, write_dino(folder)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)) for shape in ((16, 16), (40, 25), (17, 33))
    ]


# Layout


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip_weights_and_back_are_the_same(activation):
    model = tiny_clip(50, activation)
    state = model.state_dict()
    back = from_open_clip(to_open_clip(state), state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    config = transformers_config(open_clip_config(model.config))
    assert open_clip_config(config) == open_clip_config(model.config)
    assert CLIPModel(config).state_dict().keys() == state.keys()


def test_layout_refuses_weights_that_do_not_fit():
    state = tiny_clip(50).state_dict()
    stored = to_open_clip(state)
    with pytest.raises(ValueError, match=r"visual\.proj has shape"):
        from_open_clip(stored | {"visual.proj": torch.zeros(3, 3)}, state)
    with pytest.raises(ValueError, match="unexpected weights extra"):
        from_open_clip(stored | {"extra": torch.zeros(1)}, state)


def test_open_clip_reads_what_we_write(clip, images):
    """The same embeddings from open_clip itself, its own preprocessing and tokenizer included."""
    import open_clip

    folder, _ = clip
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    ours = load_clip(str(folder))
    texts = ["a dog on the beach", "cat", ""]
    with torch.no_grad():
        pixels = torch.stack([preprocess(image) for image in images])
        torch.testing.assert_close(ours.identity.preprocessing(images), pixels, rtol=0, atol=1e-6)
        pictures = theirs.eval().encode_image(pixels, normalize=True)
        prompts = theirs.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(ours.embed_images(images), pictures, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.embed_texts(texts), prompts, rtol=0, atol=1e-5)


def test_open_clip_takes_the_models_that_only_it_knows(clip, tmp_path, images):
    folder = shutil.copytree(clip[0], tmp_path / "other")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["pool_type"] = "argmax"  # its default, but nothing the original CLIP's files say
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert not is_original_clip(folder)
    theirs, ours = load_clip(str(folder)), load_clip(str(clip[0]))
    assert (theirs.identity.library, ours.identity.library) == ("open_clip", "transformers")
    torch.testing.assert_close(theirs.embed_images(images), ours.embed_images(images), rtol=0, atol=1e-5)


# CLIP


def test_bundled_layout_gives_the_models_own_embeddings(clip, images):
    folder, model = clip
    encoder = load_clip(str(folder))
    pixels = encoder.identity.preprocessing(images)
    expected = model.get_image_features(pixel_values=pixels).pooler_output.detach()
    found = encoder.embed_images(images)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert encoder.embed_texts(["a dog", "a dog on the beach"]).shape == (2, 12)


def test_transformers_layout_gives_the_same_embeddings(clip, tmp_path, images):
    folder, model = clip
    other = shutil.copytree(folder, tmp_path / "clip")
    model.save_pretrained(other)
    write_preprocessor(other, size={"shortest_edge": 16})
    a, b = load_clip(str(folder)), load_clip(str(other))
    assert a.identity.weights == b.identity.weights
    # not bit for bit: the weights are, but a processor's last bit may depend on where in memory they lie
    torch.testing.assert_close(a.embed_images(images), b.embed_images(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(a.embed_texts(["a dog"]), b.embed_texts(["a dog"]), rtol=0, atol=1e-6)


def test_batches_do_not_change_embeddings(clip, images, monkeypatch):
    encoder = load_clip(str(clip[0]))
    together = encoder.embed_images(images)
    monkeypatch.setattr(encoders, "BATCH", 1)
    torch.testing.assert_close(encoder.embed_images(iter(images)), together, rtol=0, atol=1e-6)


# DINO


def test_dino_embeds_by_the_class_token(dino, images):
    folder, model = dino
    encoder = load_dino(str(folder))
    expected = model(pixel_values=encoder.identity.preprocessing(images)).last_hidden_state[:, 0].detach()
    found = encoder.embed_images(images)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-6)


def test_dino_refuses_other_models(clip, tmp_path):
    clip[1].save_pretrained(tmp_path)
    write_preprocessor(tmp_path)
    with pytest.raises(UserError, match="is a clip"):
        load_dino(str(tmp_path))


# Preprocessing and identity


def test_preprocessing_takes_the_middle_and_normalises():
    pixels = np.zeros((2, 6, 3), dtype=np.uint8)
    pixels[:, 2:4] = 255  # the middle square is white
    found = Preprocessing(size=2, resize=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.25))([Image.fromarray(pixels)])
    assert found.shape == (1, 3, 2, 2)
    assert found[0, :, 0, 0].tolist() == [1, 1, 2]
    assert (found == found[..., :1, :1]).all()


def test_the_first_dino_sees_what_the_field_shows_it(tmp_path, dino):
    """Its configuration asks for a square of 224, without a crop."""
    folder = shutil.copytree(dino[0], tmp_path / "dino-vits16")
    values = json.loads((folder / "preprocessor_config.json").read_text()) | {"size": 224, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    found = load_dino(str(folder)).identity.preprocessing
    assert found == Preprocessing(size=224, resize=256, mean=tuple(MEAN), std=tuple(STD))


@pytest.mark.parametrize(
    ("changes", "resize", "size"),
    [
        ({"size": 16}, 16, 16),
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}, 20, 16),
        ({"size": {"height": 16, "width": 16}, "crop_size": 8}, 16, 16),  # not asked to crop
    ],
)
def test_preprocessing_is_read_from_transformers_files(tmp_path, dino, changes, resize, size):
    folder = shutil.copytree(dino[0], tmp_path / "dino")
    write_preprocessor(folder, **changes)
    found = load_dino(str(folder)).identity.preprocessing
    assert found == Preprocessing(size=size, resize=resize, mean=tuple(MEAN), std=tuple(STD))


def test_identity_knows_the_weights_and_says_miniature(clip, dino, tmp_path):
    folder = shutil.copytree(dino[0], tmp_path / "mini_dino")
    changed = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    with torch.no_grad():
        changed.layernorm.weight[0] += 1e-3
    changed.save_pretrained(folder)
    before, after = load_dino(str(dino[0])).identity, load_dino(str(folder)).identity
    assert before.weights != after.weights
    assert before.miniature
    assert str(before).startswith("miniature DINO mini_dino (transformers, 16 px, weights ")
    pair = load_encoders(str(clip[0]), str(dino[0]))
    assert pair.miniature
    assert json.loads(json.dumps(pair.to_dict()))["dino"]["weights"] == before.weights


def test_auto_falls_back_to_the_miniatures_and_says_so(clip, dino, monkeypatch, capsys):
    monkeypatch.setattr(encoders, "FIELD_CLIP", "data/no_such_clip")
    monkeypatch.setattr(encoders, "FIELD_DINO", "data/no_such_dino")
    monkeypatch.setattr(encoders, "MINI_CLIP", str(clip[0]))
    monkeypatch.setattr(encoders, "MINI_DINO", str(dino[0]))
    assert load_encoders().clip.identity.name == "mini_clip"
    assert "there is no encoder folder data/no_such_clip; scoring with the bundled" in capsys.readouterr().err


@pytest.mark.parametrize("load", [load_clip, load_dino])
def test_missing_and_damaged_folders_are_named(load, tmp_path):
    with pytest.raises(UserError, match=r"there is no encoder folder \./nowhere"):
        load("./nowhere")
    with pytest.raises(UserError, match=tmp_path.name):
        load(str(tmp_path))


def test_damaged_clip_is_named(clip, tmp_path):
    folder = shutil.copytree(clip[0], tmp_path / "clip")
    (folder / "open_clip_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a CLIP in open_clip's layout"):
        load_clip(str(folder))


def test_weights_with_another_activation_than_the_model_are_refused(monkeypatch):
    """open_clip only warns, and would score with what the weights were not trained for."""
    open_clip = pytest.importorskip("open_clip")

    def create_model(*arguments: object, **options: object) -> None:
        warnings.warn("QuickGELU mismatch between model and tag", UserWarning, stacklevel=1)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(UserError, match="QuickGELU mismatch"):
        load_clip("ViT-B-32/openai")


def test_the_fields_clip_has_the_activation_of_its_weights():
    open_clip = pytest.importorskip("open_clip")
    model, tag = encoders.FIELD_CLIP.split("/")
    wanted = open_clip.pretrained.get_pretrained_cfg(model, tag)["quick_gelu"]
    assert open_clip.get_model_config(model).get("quick_gelu", False) == wanted
