"""The miniature world's promises that need neither its pictures nor a training."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from tiny_world import write_things

from eval.subjects import Subject
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.sampling.pictures import save_png
from gsoft_diffusion.training.run import TrainingResult
from pretraining import check_new_photos, check_subjects, render, subjects, unused_name
from pretraining.check import COLORED_CLASSES, colored_prompts, frechet_distance, right_on_scenes, sharpness
from pretraining.check_new_photos import new_photos
from pretraining.check_subjects import (
    closeness,
    drawn,
    measure,
    measurements,
    read_albums,
    recognised,
    train_on,
    write_measurements,
)
from pretraining.checkpoint import Average, Checkpoint
from pretraining.color_words import caption_pairs, composed
from pretraining.kept_weights import keep, start_from
from pretraining.precision import fast_autocast
from pretraining.sprites import CLASSES, HELD_OUT, TUNING, Sprite, Sprites
from pretraining.sweep_subjects import SETTINGS, means, table
from pretraining.tokenizer import END, START, learn, save
from pretraining.train_clip import (
    BATCH,
    GROUP,
    HELD_BACK,
    batch_of_scenes,
    contrastive_loss,
    groups_of_scenes,
    text_tower,
)
from pretraining.train_judge import Judge, numbered
from pretraining.train_unet import (
    JUDGED,
    Prompts,
    build_unet,
    cache_latents,
    draw_timesteps,
    held_back_loss,
    training_state,
)
from pretraining.train_vae import build_vae, fold_statistics, learning_rate, psnr
from pretraining.world import (
    _PAINTERS,
    BACKGROUNDS,
    COLORS,
    UNKNOWN_NAME_LETTERS,
    World,
    _from_oklab,
    _recolored,
    _to_oklab,
    caption,
)


def test_subjects_are_never_in_the_training_set_but_their_class_is():
    shown = {code for codes in CLASSES.values() for code in codes}
    for word, code in [*HELD_OUT.values(), *TUNING.values()]:
        assert code not in shown
        assert word in CLASSES
    assert not set(HELD_OUT.values()) & set(TUNING.values())


def test_only_the_second_judge_is_shown_the_subjects(tmp_path, monkeypatch):
    monkeypatch.setattr("pretraining.world._VARIANTS", 1)
    write_things(tmp_path)
    kept_out = {(word, code) for word, code in [*HELD_OUT.values(), *TUNING.values()]}

    def drawn(world: World) -> set[tuple[str, str]]:
        return {(word, sprite.code) for word, sprites in world.classes.items() for sprite in sprites}

    assert not drawn(World(tmp_path)) & kept_out
    assert drawn(World(tmp_path, subjects=True)) - drawn(World(tmp_path)) == kept_out


def test_world_is_large_enough():
    assert len(CLASSES) >= 24
    assert len(BACKGROUNDS) >= 10
    assert set(_PAINTERS) == set(BACKGROUNDS)


@pytest.mark.parametrize("colored", [0.0, 1.0])
def test_as_many_scenes_have_another_color_as_asked(monkeypatch, colored):
    monkeypatch.setattr(World, "__init__", lambda self: None)
    monkeypatch.setattr(World, "draw", lambda *args, color, **more: np.zeros((64, 64, 3), np.uint8))
    world, rng = World(), np.random.default_rng(0)
    world.classes = {"clock": [Sprite("1f552", Image.new("RGBA", (64, 64)))]}
    for _ in range(20):
        scene = world.sample(rng, colored)
        assert (scene.color is not None) == bool(colored)
        assert f"{scene.color} clock" in scene.caption if colored else "clock" in scene.caption


def test_captions_name_what_is_there_and_never_the_unique_token():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = caption(rng, "owl", "beach", "orange", hat=True)
        assert "owl" in text
        assert "orange" in text
        assert "wearing a hat" in text
        assert "sks" not in text
        assert "a owl" not in text
        assert "a orange" not in text


@pytest.mark.parametrize("name", sorted(BACKGROUNDS))
def test_backgrounds_are_drawn_differently_each_time(name):
    rng = np.random.default_rng(0)
    first, second = (np.asarray(_PAINTERS[name](rng)) for _ in range(2))
    assert first.shape == (160, 160, 3)
    assert not np.array_equal(first, second)


def test_colors_are_apart():
    colors = np.array(list(COLORS.values()), float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1e3 * np.eye(len(colors))
    assert distances.min() > 70


def test_oklab_is_lightness_and_two_colors_and_can_be_undone():
    gray = _to_oklab(np.array([[0.0, 0, 0], [0.5, 0.5, 0.5], [1, 1, 1]]))
    assert gray[:, 0] == pytest.approx([0, 0.598, 1], abs=1e-3)  # sRGB 0.5 is 0.214 in linear light, whose cube root
    assert np.abs(gray[:, 1:]).max() < 1e-3
    rgb = np.random.default_rng(0).random((50, 3))
    assert np.allclose(_from_oklab(_to_oklab(rgb)), rgb, atol=1e-5)


def test_what_is_recolored_keeps_its_inner_drawing_and_its_shading():
    size, body = 64, np.array([0.8, 0.5, 0.3])
    rgba = np.ones((size, size, 4))
    shading = np.linspace(0.7, 1.1, size)[:, None, None]  # darker above, brighter below
    rgba[..., :3] = body * shading
    rgba[20:26, 20:26, :3] = 0.05  # an eye
    rgba[40:46, 30:40, :3] = (0.95, 0.2, 0.3)  # a mouth, of another hue
    thing = Image.fromarray((rgba * 255).astype(np.uint8), "RGBA")
    blue = np.asarray(_recolored(thing, COLORS["blue"]), float)
    assert blue[20:26, 20:26, :3].max() < 40
    assert blue[42, 35, 0] > 2 * blue[42, 35, 2]
    for row in (5, 60):
        assert blue[row, 5, 2] > 1.5 * blue[row, 5, 0]
    assert blue[60, 5, :3].sum() > 1.3 * blue[5, 5, :3].sum()
    assert (blue[..., 3] == 255).all()


def test_tokenizer_has_stable_diffusions_layout(tmp_path):
    from transformers import CLIPTokenizer

    vocabulary, merges = learn(["a photo of a dog on the beach", "a photo of a sks dog"] * 50)
    assert list(vocabulary)[-2:] == [START, END]
    saved = save(vocabulary, merges, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("a photo of a sks dog", "a zebra!", "Ünïcode 123"):
        assert loaded(text).input_ids == saved(text).input_ids
    ids = loaded("a sks dog", padding="max_length").input_ids
    assert ids[0] == vocabulary[START]
    assert ids[-1] == vocabulary[END]
    assert loaded.tokenize("sks dog") == ["sks</w>", "dog</w>"]


def test_unused_name_of_the_bundled_base_means_what_unknown_names_do():
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained("data/mini_base/tokenizer")
    rows = CLIPTextModel.from_pretrained("data/mini_base/text_encoder").get_input_embeddings().weight
    letters = [tokenizer.convert_tokens_to_ids(f"{letter}</w>") for letter in UNKNOWN_NAME_LETTERS]
    torch.testing.assert_close(rows[tokenizer.convert_tokens_to_ids("sks</w>")], rows[letters].mean(dim=0))
    assert "s" not in UNKNOWN_NAME_LETTERS


def test_a_rewritten_text_encoder_has_the_usual_names_and_mode(tmp_path, monkeypatch):
    """What pretraining writes can be read by other programs and users, too."""
    from transformers import CLIPTextModel

    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(Path("data/mini_base") / part, tmp_path / part)
    monkeypatch.setattr(sys, "argv", ["unused_name", "--base", str(tmp_path)])
    before = os.umask(0o027)
    try:
        unused_name.main()
    finally:
        os.umask(before)
    path = tmp_path / "text_encoder" / "model.safetensors"
    assert path.stat().st_mode & 0o777 == 0o640
    assert all(name.startswith("text_model.") for name in load_file(path))
    read, bundled = (CLIPTextModel.from_pretrained(folder) for folder in (path.parent, "data/mini_base/text_encoder"))
    assert all(torch.equal(tensor, bundled.state_dict()[name]) for name, tensor in read.state_dict().items())


def test_folding_statistics_keeps_pictures_and_whitens_latents():
    torch.manual_seed(0)
    vae = build_vae().eval()
    pixels = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        spread_before = (
            vae.encode(pixels).latent_dist.std / vae.encode(pixels).latent_dist.mean.std((0, 2, 3))[:, None, None]
        )
        fold_statistics(vae, pixels)
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    channels = vae.config.latent_channels
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.std, spread_before, atol=1e-4, rtol=1e-3)


def test_half_of_clip_s_batch_are_scenes_that_differ_in_what_they_show_alone():
    rng = np.random.default_rng(0)
    places, colors = [f"place {n}" for n in range(20)], [None, *(f"color {n}" for n in range(30))]
    facts = [{"background": str(rng.choice(places)), "color": rng.choice(colors)} for _ in range(HELD_BACK + 20_000)]
    chosen = batch_of_scenes(rng, groups_of_scenes(facts), len(facts))
    assert len(chosen) == BATCH
    assert chosen.min() >= HELD_BACK
    together = Counter((facts[number]["background"], facts[number]["color"]) for number in chosen)
    assert sum(count for count in together.values() if count >= GROUP - 1) >= BATCH // 2 - BATCH // 2 // GROUP
    assert (np.diff(chosen) >= 0).all()


def test_contrastive_loss_counts_equal_captions_as_equal_answers():
    text = torch.eye(3)[[0, 0, 1]]
    same = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    loss = contrastive_loss(text, text, torch.tensor(100.0).log(), same)
    assert loss.item() == pytest.approx(2 / 3 * np.log(2), abs=1e-5)


def test_checkpoint_goes_on_where_it_stopped(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    average = Average(model)
    Checkpoint(tmp_path / "state.pt", model=model, average=average).save(96)
    other = torch.nn.Linear(2, 2)
    other_average = Average(other)
    assert Checkpoint(tmp_path / "state.pt", model=other, average=other_average).restore() == 96
    assert torch.equal(other.weight, model.weight)
    assert all(torch.equal(a, b) for a, b in zip(other_average.values, average.values, strict=True))
    assert Checkpoint(tmp_path / "none.pt", model=other).restore() == 0


def test_kept_weights_are_half_as_large_and_say_how_far_they_are(tmp_path):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(40, 50), torch.nn.Linear(40, 50)
    keep(tmp_path / "kept.safetensors", first, 4800)
    assert start_from(tmp_path / "kept.safetensors", second) == 4800
    assert torch.equal(second.weight, first.weight.half().float())
    assert (tmp_path / "kept.safetensors").stat().st_size < 2 * (40 * 50 + 50) + 300
    with pytest.raises(RuntimeError, match="size mismatch"):
        start_from(tmp_path / "kept.safetensors", torch.nn.Linear(40, 51))


def tiny_clip(seed: int):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def test_text_tower_is_that_of_the_clip(tmp_path):
    from transformers import CLIPTextModel

    ids = torch.tensor([[4, 7, 1, 1, 1, 1, 1, 1]])
    clip = tiny_clip(0)
    text_tower(clip).save_pretrained(tmp_path)
    tower = CLIPTextModel.from_pretrained(tmp_path)
    assert torch.equal(tower(ids).last_hidden_state, clip.text_model(ids).last_hidden_state)


def test_training_goes_on_from_given_weights():
    first = build_unet(4)
    unet, averages, optimizer = training_state(4, first.state_dict())
    assert len(averages) == 2
    for average in averages:
        averaged = build_unet(4)
        average.copy_to(averaged)
        for key, value in first.state_dict().items():
            assert torch.equal(unet.state_dict()[key], value)
            assert torch.equal(averaged.state_dict()[key], value)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in unet.parameters()}


def test_timesteps_reach_both_ends_and_crowd_the_middle():
    torch.manual_seed(0)
    drawn = draw_timesteps(200_000, 1000)
    share = torch.histc(drawn.float(), 10, 0, 1000) / len(drawn)
    assert drawn.min() == 0
    assert drawn.max() == 999
    assert share.argmax() in (4, 5)
    assert share[[0, -1]] == pytest.approx([0.05 + 0.5 * 0.014] * 2, abs=0.002)  # of a logit-normal, 1.4 % below 0.1


def test_learning_rate_rises_holds_and_falls():
    rates = [learning_rate(seen, 1000, 2.0, warmup=100, tail=0.25) for seen in (0, 49, 99, 749, 875, 1000)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 2.0, 2.0 * (0.02 + 0.98 / 2), 0.04], abs=1e-2)


def test_latents_of_another_autoencoder_or_other_scenes_are_not_taken(tmp_path):
    def vae(seed: int) -> AutoencoderKL:
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        return AutoencoderKL(**blocks, block_out_channels=(8, 8, 8), norm_num_groups=4)

    path, scenes = tmp_path / "latents.npy", np.zeros((2, 64, 64, 3), np.uint8)
    first = cache_latents(vae(0), scenes, path)
    assert first.shape == (2, 4, 16, 16)
    np.testing.assert_array_equal(cache_latents(vae(0), scenes, path), first)
    for other in ((vae(1), scenes), (vae(0), scenes + 1), (vae(0), scenes[:1])):
        with pytest.raises(SystemExit, match=r"latents\.npy: of another autoencoder or other scenes"):
            cache_latents(*other, path)


@pytest.mark.parametrize("scenes", ["0", "1000", "101000"])
def test_scenes_that_would_stay_black_are_refused(tmp_path, monkeypatch, capsys, scenes):
    Sprites(tmp_path).assets.mkdir(parents=True)
    arguments = ["--sprites", str(tmp_path), "--out", str(tmp_path / "out"), "--scenes", scenes]
    monkeypatch.setattr("sys.argv", ["render", *arguments])
    with pytest.raises(SystemExit):
        render.main()
    assert f"--scenes {scenes}: must be a multiple of {render.CHUNK}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_photos_are_not_taken_for_the_rest_of_a_run(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(SystemExit, match="has something else in it than a run"):
        train_on(Subject("dog", "dog", True, tmp_path), tmp_path, {}, tmp_path)
    assert (tmp_path / "a.png").exists()


def test_a_run_that_a_signal_ended_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    folder, subject = tmp_path / "run", Subject("dog", "dog", True, tmp_path)

    def stopped(config):
        folder.mkdir()
        (folder / "settings.yaml").touch()
        (folder / "adapter.safetensors").touch()
        return TrainingResult(folder / "adapter.safetensors", steps=3, interrupted=True, seconds=1.0)

    monkeypatch.setattr(check_subjects, "train", stopped)
    for _ in range(2):  # the second call trains anew
        with pytest.raises(KeyboardInterrupt):
            train_on(subject, tmp_path, {}, folder)
        assert not (folder / "adapter.safetensors").exists()


def test_measurements_are_replaced_whole(tmp_path):
    path, before = tmp_path / "subjects.json", tmp_path / "before.json"
    path.write_text("{}")
    before.hardlink_to(path)
    write_measurements(path, {"rows": []})
    assert json.loads(path.read_text()) == {"rows": []}
    assert before.read_text() == "{}"


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_scenes_that_cannot_be_drawn_leave_the_earlier_ones_with_their_captions(tmp_path, monkeypatch, folder):
    out, sprites = tmp_path / "out", tmp_path / "empty"
    Sprites(sprites).assets.mkdir(parents=True)
    out.mkdir()
    for name in ("scenes.npy", "scenes.jsonl"):
        (out / name).write_text("earlier")
    arguments = ["--sprites", str(tmp_path / folder), "--out", str(out), "--scenes", str(render.CHUNK)]
    monkeypatch.setattr("sys.argv", ["render", *arguments])
    with pytest.raises(SystemExit if folder == "nowhere" else BrokenProcessPool):
        render.main()
    assert {(out / name).read_text() for name in ("scenes.npy", "scenes.jsonl")} == {"earlier"}


@pytest.mark.parametrize("program", [render, subjects, check_new_photos])
def test_a_folder_without_sprites_is_one_line(tmp_path, monkeypatch, capsys, program):
    monkeypatch.setattr("sys.argv", ["it", "--sprites", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        program.main()
    assert f"argument --sprites: {tmp_path}: npm has installed no sprites there" in capsys.readouterr().err


def test_processors_without_mkldnn_compute_in_float32(monkeypatch):
    """Apple's, for which PyTorch has no such operation to ask."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    with fast_autocast():
        assert torch.ones(2, 2).matmul(torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "value"),
    [("learning_rate=2e-3", 2e-3), ("max_train_steps=400", 400), ("lr_scheduler=cosine", "cosine"), ("seed", "")],
)
def test_settings_of_the_training_are_read(text, value):
    assert check_subjects.read_settings([text]) == {text.partition("=")[0]: value}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("learning_rate=fast", "learning_rate: 'fast' is not a number or none"),
        ("rate=1", "--set: unknown setting rate"),
    ],
)
def test_wrong_settings_of_the_training_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, given, message):
    flags = {
        "--work": tmp_path,
        "--base": tmp_path,
        "--subjects": "data/subjects",
        "--out": tmp_path / "out",
        "--set": given,
    }
    monkeypatch.setattr("sys.argv", ["check_subjects", *(str(word) for pair in flags.items() for word in pair)])
    with pytest.raises(UserError, match=message):
        check_subjects.main()
    assert not (tmp_path / "out").exists()


def test_prompts_are_embedded_once_and_minus_one_is_the_empty_one():
    class Encoder:
        calls = 0
        device = torch.device("cpu")

        def __call__(self, ids):
            self.calls += len(ids)
            return SimpleNamespace(last_hidden_state=ids[..., None].float())

    class Tokenizer:
        def __call__(self, texts, **_):
            return SimpleNamespace(input_ids=torch.tensor([[len(text)] * 3 for text in texts]))

    encoder = Encoder()
    prompts = Prompts(["a dog", "a cat on a mat", "a dog"], Tokenizer(), encoder)
    assert encoder.calls == 3
    assert prompts.embed(np.array([2, -1, 1]))[:, 0, 0].tolist() == [5, 0, 14]


def test_held_back_loss_is_the_same_each_time_and_covers_all_timesteps():
    torch.manual_seed(0)
    seen = []

    class Zero:
        device = torch.device("cpu")

        def __call__(self, noisy, timesteps, context):
            seen.append(timesteps)
            return SimpleNamespace(sample=torch.zeros_like(noisy))

    latents = np.random.default_rng(0).standard_normal((JUDGED, 4, 16, 16)).astype(np.float16)
    prompts = SimpleNamespace(embed=lambda numbers: torch.zeros(len(numbers), 3, 8))
    first, second = (held_back_loss(Zero(), latents, prompts) for _ in range(2))
    assert first == second == pytest.approx(1, abs=0.01)  # the velocity of unit noise and unit latents has variance 1
    timesteps = torch.cat(seen[: JUDGED // 64])
    assert torch.histc(timesteps.float(), 10, 0, 1000).min() > 0.08 * JUDGED


def test_judge_names_what_it_was_shown():
    torch.manual_seed(0)
    judge = Judge((8, 16, 16, 16))
    facts = [
        {"class_word": "dog", "background": "snow", "color": None},
        {"class_word": "car", "background": "red", "color": "blue"},
    ]
    true = numbered(facts)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    for _ in range(60):
        logits = judge(pixels)
        torch.stack([torch.nn.functional.cross_entropy(logits[name], true[name]) for name in true]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    answers = judge.answers(pixels)
    assert answers == {"class_word": ["dog", "car"], "background": ["snow", "red"], "color": ["its own", "blue"]}


def test_frechet_distance_of_shifted_and_scaled_features():
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 2) == pytest.approx(12, rel=1e-6)
    y = x * torch.tensor([3.0, 1, 1])  # between normal distributions along one axis: (3 − 1)²
    assert frechet_distance(x, y) == pytest.approx(4, rel=0.03)


def test_sharpness_of_blurred_and_of_contrasted_pictures():
    x = torch.rand(4, 3, 64, 64)
    assert sharpness(x, x) == pytest.approx(1)
    assert sharpness(x / 2, x) == pytest.approx(0.5)
    assert sharpness(torch.nn.functional.avg_pool2d(x, 3, 1, 1), x) < 0.5


def test_colored_prompts_ask_every_color_of_several_classes():
    asked = colored_prompts()
    assert len(asked) == len({prompt for prompt, _, _ in asked}) == 72
    for color in COLORS:
        assert len({word for _, word, c in asked if c == color}) == COLORED_CLASSES


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 8, 8)
    assert psnr(x + 0.2, x) == pytest.approx(20, abs=1e-4)  # an error of a tenth of the range


def test_a_judge_is_right_about_color_and_class_only_where_both_are():
    facts = [
        {"class_word": "dog", "background": "snow", "color": "red"},
        {"class_word": "cat", "background": "snow", "color": "red"},
        {"class_word": "cat", "background": "snow", "color": None},
    ]
    given = {"class_word": ["dog", "dog", "cat"], "background": ["snow", "city", "snow"]}
    given["pair"] = [("red", word) for word in given["class_word"]]
    found = right_on_scenes(facts, given)
    assert found == {"class": pytest.approx(2 / 3), "background": pytest.approx(2 / 3), "color_and_class": 0.5}


def test_closeness_of_pictures_by_hand():
    photos = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # alike by 0.8
    copy, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = closeness(torch.cat([copy, other]), copy, photos)
    assert found["likeness"] == pytest.approx((1 + 0.8 + 0 + 0.6) / 4 / 0.8)
    assert found["copies"] == 1
    assert closeness(copy, other, photos)["copies"] == 0
    assert closeness(copy, torch.empty(0, 2), photos)["copies"] == 0


def test_a_picture_is_recognised_by_its_nearest_photo_of_all_subjects():
    photos_of = {"bear": torch.tensor([[1.0, 0.0]]), "dog": torch.tensor([[0.0, 1.0], [0.6, 0.8]])}
    pictures = torch.tensor([[0.9, 0.4], [0.7, 0.7], [0.1, 0.9]])
    assert recognised(pictures, "bear", photos_of) == pytest.approx(1 / 3)
    assert recognised(pictures, "dog", photos_of) == pytest.approx(2 / 3)


def test_pictures_are_sorted_by_the_model_that_drew_them(tmp_path):
    picture = Image.new("RGB", (64, 64), "red")
    for number, (model, place) in enumerate([("adapter", "snow"), ("base", "snow"), ("adapter", "space")]):
        facts = {"model": model, "prompt": f"a sks bear {BACKGROUNDS[place][0]}"}
        save_png(picture, tmp_path, "{}.png", number, facts)
    save_png(picture, tmp_path, "contact_sheet_{}.png", 0, {})
    found = drawn(tmp_path)
    assert [place for place, _ in found["adapter"]] == ["snow", "space"]
    assert [place for place, _ in found["base"]] == ["snow"]


def test_new_photos_show_the_subject_where_no_photo_does(tmp_path, monkeypatch):
    monkeypatch.setattr("pretraining.world._VARIANTS", 1)
    write_things(tmp_path)
    world = World(tmp_path)
    _, sprite = world.held_out["teddy_bear"]
    shown = list(BACKGROUNDS)[1:]  # all but the snow
    pictures = new_photos(world, sprite, shown, seed=0)
    assert [place for place, _ in pictures] == ["snow"] * 8
    first, again, other = (new_photos(world, sprite, shown, seed)[0][1] for seed in (0, 0, 1))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_a_sweep_s_means_are_over_subjects_of_one_setting():
    rows = [
        {"subject": subject, "learning_rate": rate, "step": 200, "guidance_scale": 3.0}
        | {"likeness": likeness, "recognised": 1.0, "place": 0.5, "copies": 0.0}
        for subject, rate, likeness in [("cap", 4e-4, 0.9), ("cap", 1e-4, 0.6), ("taxi", 1e-4, 0.8)]
    ]
    low, high = means(rows)
    assert (low["learning_rate"], low["likeness"], low["subjects"]) == (1e-4, pytest.approx(0.7), 2)
    assert (high["learning_rate"], high["likeness"], high["subjects"]) == (4e-4, pytest.approx(0.9), 1)
    assert table([low]).splitlines()[-1] == "| 1e-04 | 200 | 3 | 0.70 | 100% | 50% | 0% |"


def test_measurements_go_on_with_the_same_base_and_settings_alone(base, tmp_path):
    path = tmp_path / "out" / "measurements.json"
    content = measurements(path, base, {"steps": 8})
    assert content["rows"] == []
    path.write_text(json.dumps(content | {"rows": [{"subject": "cap"}]}))
    assert measurements(path, base, {"steps": 8})["rows"] == [{"subject": "cap"}]
    with pytest.raises(SystemExit, match="other settings"):
        measurements(path, base, {"steps": 9})


def test_judges_measure_pictures_and_photos_of_a_subject(tmp_path):
    class Told(Judge):
        def answers(self, pixels):
            red = [picture[0].mean() > picture[2].mean() for picture in pixels]
            return {"class_word": ["bear" if r else "dog" for r in red], "background": ["snow"] * len(pixels)}

    class Mean:
        def embed_images(self, images):
            colors = torch.stack([torch.from_numpy(np.array(image)).float().mean((0, 1)) for image in images])
            return torch.nn.functional.normalize(colors, dim=1)

    red, blue, purple = (Image.new("RGB", (64, 64), color) for color in ("red", "blue", "purple"))
    subjects = []
    for name, photos in {"ted": [red, red, purple], "rex": [blue]}.items():
        (tmp_path / name).mkdir()
        for number, photo in enumerate(photos):
            photo.save(tmp_path / name / f"{number}.png")
        subjects.append(Subject(name, "bear", False, tmp_path / name))
    albums = read_albums(subjects, Mean(), Told())
    found = measure("ted", albums, [("snow", red), ("space", blue)], Mean(), Told())
    assert not found.keys() & {"subject", *SETTINGS}  # which say whose figures and at which setting these are
    assert found["recognised"] == found["class"] == found["place"] == 0.5
    assert found["class_of_photos"] == pytest.approx(2 / 3)  # the judge takes purple for blue
    assert found["copies"] == 0  # the red picture is of a place that a photo shows; the blue one is not near


def test_captions_with_and_without_a_color_differ_by_it_alone():
    for seed in range(50):
        color, colored, plain = caption_pairs(seed)
        assert len(colored) == len(plain) == len(CLASSES)
        for word, with_color, without in zip(CLASSES, colored, plain, strict=True):
            assert f"{color} {word}" in with_color
            assert f"{color} {word}" not in without
            words = with_color.replace(f"{color} {word}", word, 1).split()
            assert [w for w in words if w not in ("a", "an")] == [w for w in without.split() if w not in ("a", "an")]


def test_a_composed_embedding_keeps_the_color_s_mean_and_the_class_s_distance():
    torch.manual_seed(0)
    colored, plain = torch.randn(33, 8, 4), torch.randn(33, 8, 4)
    target = composed(colored, plain, position=3)
    assert torch.equal(target[:, :4], colored[:, :4])
    torch.testing.assert_close(target.mean(0)[4:], colored.mean(0)[4:])
    torch.testing.assert_close(target[:, 4:] - target[:1, 4:], plain[:, 3:-1] - plain[:1, 3:-1])
