"""What gsoft-draw writes, and what it takes from an adapter's file."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import randomise

from gsoft_diffusion.adapters import loading as models_module
from gsoft_diffusion.adapters.file import read_adapter, save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.config import AdapterConfig, GenerationConfig, SamplerConfig
from gsoft_diffusion.config.prompts import with_names
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import METADATA_KEY
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.sampling import contact_sheets, drawing
from gsoft_diffusion.sampling.drawing import _columns, _precision, _sampler, draw
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.sampling.pictures import read_facts, save_png

FEW_STEPS = SamplerConfig(num_inference_steps=3, guidance_scale=3.0)


def arrays(samples) -> list[np.ndarray]:
    return [np.asarray(sample.image, dtype=int) for sample in samples]


def write_adapter(base, path, seed, prompts):
    """An adapter with random rotations, as training would leave it. Returns its path."""
    model = load_model(str(base))
    identity = identity_of(model)
    adapter = inject(AdapterConfig(nblocks=4), model.unet, [model.text_encoder])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    path.parent.mkdir()
    training = {"sampler": FEW_STEPS.to_dict(), "resolution": 36}
    save_adapter(path, adapter, base_model=identity, training=training, prompts=prompts)
    return path


@pytest.fixture
def adapter_file(base, tmp_path):
    prompts = {"instance_prompt": "a photo of a sks dog", "unique_token": "sks", "class_word": None}
    return write_adapter(base, tmp_path / "dog" / "adapter.safetensors", 0, prompts)


def read(path) -> tuple[np.ndarray, dict]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int), json.loads(image.text[METADATA_KEY])


def pictures_in(folder) -> dict[str, tuple[np.ndarray, dict]]:
    return {path.name: read(path) for path in sorted(folder.glob("*.png")) if not path.name.startswith("contact")}


def test_draw_writes_exactly_what_was_asked_for(adapter_file):
    config = GenerationConfig((str(adapter_file),), prompts=("a sks dog", "../x"), num_images=3, seed=5, batch_size=4)
    (sheet,) = draw(config)
    assert sheet.is_file()
    pictures = pictures_in(adapter_file.parent / "images")
    assert list(pictures) == [
        "0000_seed5_a-sks-dog.png",
        "0001_seed6_a-sks-dog.png",
        "0002_seed7_a-sks-dog.png",
        "0003_seed5_x.png",
        "0004_seed6_x.png",
        "0005_seed7_x.png",
    ]
    _, metadata = pictures["0004_seed6_x.png"]
    assert (metadata["prompt"], metadata["seed"], metadata["model"]) == ("../x", 6, "adapter")
    assert metadata["sampler"] == FEW_STEPS.to_dict() | {"scheduler": "DDIMScheduler"}
    assert metadata["adapters"] == [{"name": f"{adapter_file.parent.name}/adapter.safetensors", "strength": 1.0}]


def test_draw_takes_from_the_adapter_what_is_not_given(adapter_file):
    draw(GenerationConfig((str(adapter_file),), prompts=("a",), num_images=1))
    draw(GenerationConfig((str(adapter_file),), prompts=("a",), num_images=1, guidance_scale=1.5, resolution=32))
    (first, first_metadata), (second, second_metadata) = pictures_in(adapter_file.parent / "images").values()
    assert (first.shape, second.shape) == ((36, 36, 3), (32, 32, 3))
    assert first_metadata["sampler"]["guidance_scale"] == 3.0
    assert second_metadata["sampler"] == first_metadata["sampler"] | {"guidance_scale": 1.5}


@pytest.mark.parametrize(
    ("trained", "given", "expected"),
    [
        ({"guidance_scale": 3.0, "negative_prompt": "x"}, {}, (3.0, "x")),
        ({"guidance_scale": 3.0, "negative_prompt": "x"}, {"guidance_scale": 1.0}, (1.0, "")),
        ({"guidance_scale": 3.0, "negative_prompt": "x"}, {"negative_prompt": "y"}, (3.0, "y")),
        ({"guidance_scale": 1.0, "negative_prompt": "x"}, {}, (1.0, "")),  # of a file that says what has no effect
    ],
    ids=str,
)
def test_the_trainings_negative_prompt_goes_with_its_guidance(trained, given, expected):
    config = GenerationConfig(("adapter.safetensors",), prompts=("a",), **given)
    sampler = _sampler(config, SimpleNamespace(training={"sampler": trained}))[0]
    assert (sampler.guidance_scale, sampler.negative_prompt) == expected


def test_a_negative_prompt_for_an_adapter_that_was_trained_without_guidance_is_refused():
    config = GenerationConfig(("adapter.safetensors",), prompts=("a",), negative_prompt="y")
    with pytest.raises(UserError, match="--negative_prompt would have no effect"):
        _sampler(config, SimpleNamespace(training={"sampler": {"guidance_scale": 1.0}}))


@pytest.mark.parametrize(
    ("sampler", "what"),
    [
        ({"shift": 3}, "sampler: unknown setting shift; known: "),
        ({"num_inference_steps": "many"}, "num_inference_steps: 'many' is not a whole number"),
        ({"guidance_scale": -1.0}, "--guidance_scale -1.0: must be 0 or more"),
        ("fast", "sampler: expected settings as `name: value`, got 'fast'"),
    ],
    ids=str,
)
def test_a_file_s_bad_sampler_is_said_to_be_the_file_s(sampler, what):
    config = GenerationConfig(("adapter.safetensors",), prompts=("a",), guidance_scale=3.0)
    file = SimpleNamespace(path=Path("dog/adapter.safetensors"), training={"sampler": sampler})
    with pytest.raises(UserError, match=re.escape(f"dog/adapter.safetensors: bad sampler settings ({what}")):
        _sampler(config, file)


def test_a_file_may_not_ask_for_pictures_of_any_size():
    config = GenerationConfig(("adapter.safetensors",), prompts=("a",))

    def asked(side: object) -> int | None:
        return _sampler(config, SimpleNamespace(training={"resolution": side}))[1]

    assert [asked(side) for side in (64, 4096, 100_000, -8, "64")] == [64, 4096, None, None, None]


def test_its_user_may():
    config = GenerationConfig(("adapter.safetensors",), prompts=("a",), resolution=8192)
    assert _sampler(config, SimpleNamespace(training={"resolution": 64}))[1] == 8192


def test_draw_in_the_shape_that_is_asked_for(adapter_file, monkeypatch):
    """Sides that are left out are the adapter's."""
    draw(GenerationConfig((str(adapter_file),), prompts=("a",), num_images=1, width=64))
    ((picture, metadata),) = pictures_in(adapter_file.parent / "images").values()
    assert picture.shape == (36, 64, 3)
    assert (metadata["width"], metadata["height"]) == (64, 36)
    monkeypatch.setattr(AdapterStack, "load", lambda *_, **__: pytest.fail("loaded in vain"))
    for flag in ("width", "resolution"):
        with pytest.raises(UserError, match=f"--{flag} 34: must be a multiple of 4"):
            draw(GenerationConfig((str(adapter_file),), prompts=("a",), **{flag: 34}))
    with pytest.raises(UserError, match="--height 0: must be more than 0"):
        GenerationConfig((str(adapter_file),), height=0)


def test_draw_keeps_no_picture_in_memory(adapter_file, monkeypatch):
    """Contact sheets are made of the files, one after the other."""
    drawn, sheets = [], []

    def watched(*arguments, **options):
        for sample in generate(*arguments, **options):
            drawn.append(weakref.ref(sample.image))
            yield sample

    def saved(image, folder, name, *rest):
        if name.startswith("contact_sheet"):
            assert not any(reference() for reference in drawn + sheets)
            sheets.append(weakref.ref(image))
        return save_png(image, folder, name, *rest)

    monkeypatch.setattr(drawing, "generate", watched)
    monkeypatch.setattr(drawing, "save_png", saved)
    monkeypatch.setattr(contact_sheets, "SHEET_PIXELS", 1)
    draw(GenerationConfig((str(adapter_file),), prompts=("a", "b"), num_images=2, compare=True))
    assert (len(drawn), len(sheets)) == (8, 2)


def test_draw_never_writes_over(adapter_file, tmp_path):
    config = GenerationConfig((str(adapter_file),), prompts=("a",), num_images=2, output_dir=str(tmp_path / "out"))
    draw(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    draw(config)
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(after) == 2 * len(before) == 6
    assert before.items() <= after.items()


def test_draw_beside_the_base_model(adapter_file, base):
    draw(GenerationConfig((str(adapter_file),), prompts=("a sks dog",), num_images=2, compare=True, resolution=32))
    pictures = pictures_in(adapter_file.parent / "images")
    assert len(pictures) == 4
    expected = arrays(generate(load_model(str(base)), [("a sks dog", 0), ("a sks dog", 1)], FEW_STEPS))
    for seed in (0, 1):
        base_picture, metadata = pictures[f"{seed:04d}_seed{seed}_base_a-sks-dog.png"]
        assert metadata["model"] == "base"
        assert np.abs(base_picture - expected[seed]).max() <= 1
        assert np.abs(pictures[f"{seed:04d}_seed{seed}_a-sks-dog.png"][0] - expected[seed]).max() > 1


def test_compiled_pictures_are_the_same_with_the_base_beside(adapter_file, tmp_path, monkeypatch):
    original = torch.compile  # without the part that makes machine code, which takes minutes
    monkeypatch.setattr(torch, "compile", lambda *arguments, **_: original(*arguments, backend="aot_eager"))
    config = GenerationConfig((str(adapter_file),), prompts=("a sks dog",), num_images=1, compare=True)
    drawn = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        draw(replace(config, compile=compiled, output_dir=str(folder)))
        drawn.append({name: picture for name, (picture, _) in pictures_in(folder).items()})
    plain, compiled = drawn
    assert plain.keys() == compiled.keys()
    assert max(np.abs(plain[name].astype(int) - compiled[name]).max() for name in plain) <= 1


def test_offloading_draws_the_same_pictures(adapter_file, tmp_path, monkeypatch):
    """With the weights made where the denoiser is, as without it: elsewhere they would be rounded otherwise."""
    on_device, merged, loaded = BaseModel.on_device, AdapterStack.use, []
    here: list[torch.nn.Module] = []

    @contextmanager
    def watched(model, *parts, **options):
        with on_device(model, *parts, **options):
            here.extend(parts)
            yield
            here.clear()

    def merge(stack, strengths):
        if strengths:
            assert {type(part).__name__ for part in here} == {"CLIPTextModel"}
        merged(stack, strengths)

    def load(*arguments, **options):
        loaded.append(options["cpu_offload"])
        return load_model(*arguments, **options)

    monkeypatch.setattr(BaseModel, "on_device", watched)
    monkeypatch.setattr(AdapterStack, "use", merge)
    monkeypatch.setattr(models_module, "load_model", load)
    config = GenerationConfig((str(adapter_file),), prompts=("a sks dog",), num_images=2, compare=True)
    drawn = []
    for offload in (False, True):
        folder = tmp_path / str(offload)
        draw(replace(config, cpu_offload=offload, output_dir=str(folder)))
        drawn.append({name: picture for name, (picture, _) in pictures_in(folder).items()})
    assert loaded == [False, True]
    plain, offloaded = drawn
    assert len(plain) == 4
    assert plain.keys() == offloaded.keys()
    assert all(np.array_equal(plain[name], offloaded[name]) for name in plain)


def test_several_adapters_at_their_strengths(adapter_file, base, tmp_path):
    """Names of both subjects fit into prompts; what is drawn is what the API draws."""
    model = load_model(str(base))
    identity = identity_of(model)
    second = inject(AdapterConfig(nblocks=2, text_encoder=False), model.unet)
    randomise(second, seed=3)
    other = tmp_path / "mug" / "adapter.safetensors"
    other.parent.mkdir()
    names = {"unique_token": "zwx", "class_word": "mug"}
    save_adapter(other, second, base_model=identity, training={"resolution": 48}, prompts=names)
    paths = (str(adapter_file), str(other))
    draw(GenerationConfig(paths, (0.5, 0.7), prompts=("a {0} and a {2} {3}",), num_images=1, compare=True))
    (picture, metadata), (plain, _) = pictures_in(adapter_file.parent / "images").values()
    assert metadata["prompt"] == "a sks and a zwx mug"
    assert metadata["adapters"] == [
        {"name": "dog/adapter.safetensors", "strength": 0.5},
        {"name": "mug/adapter.safetensors", "strength": 0.7},
    ]
    assert metadata["subjects"] == [{"instance_prompt": "a photo of a sks dog", "unique_token": "sks"}, names]
    fresh = load_model(str(base))
    stack = AdapterStack(fresh.denoiser, fresh.text_encoders)
    for path in paths:
        stack.load(path, path)
    for strengths, drawn in ((dict(zip(paths, (0.5, 0.7), strict=True)), picture), ({}, plain)):
        stack.use(strengths)
        (wanted,) = arrays(generate(fresh, [("a sks and a zwx mug", 0)], FEW_STEPS, resolution=36))
        assert np.abs(drawn - wanted).max() <= 1
    assert np.abs(picture - plain).max() > 1


def test_prompts_from_a_file(adapter_file, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# animals\n a dog # 1\n\n  a cat  \n  # a tree\n", encoding="utf-8", newline="\r\n")
    draw(GenerationConfig((str(adapter_file),), prompts_file=str(path), num_images=1))
    prompts = [metadata["prompt"] for _, metadata in pictures_in(adapter_file.parent / "images").values()]
    assert prompts == ["a dog # 1", "a cat"]


def test_prompts_with_places_for_the_subjects_name(adapter_file):
    draw(GenerationConfig((str(adapter_file),), prompts=("a {0} dog {0.__class__}",), num_images=1))
    ((_, metadata),) = pictures_in(adapter_file.parent / "images").values()
    assert metadata["prompt"] == "a sks dog {0.__class__}"
    with pytest.raises(UserError, match=r"\{1\} cannot be filled in: the subject's class_word is not known"):
        draw(GenerationConfig((str(adapter_file),), prompts=("a {0} {1}",)))


def test_names_of_several_subjects():
    dog, mug = {"unique_token": "{2}", "class_word": "dog"}, {"unique_token": "zwx", "class_word": "mug"}
    assert with_names("a {0} {1} and a {2} {3}, {}, {4.x}", [dog, mug]) == "a {2} dog and a zwx mug, {}, {4.x}"
    with pytest.raises(UserError, match=r"\{4\} stands for subject 3, but there are 2"):
        with_names("a {4} {5}", [dog, mug])


def test_a_run_s_folder_is_its_adapter(adapter_file):
    draw(GenerationConfig((str(adapter_file.parent),), prompts=("a",), num_images=1))
    ((_, metadata),) = pictures_in(adapter_file.parent / "images").values()
    assert metadata["adapters"] == [{"name": "dog/adapter.safetensors", "strength": 1.0}]
    with pytest.raises(UserError, match=r"holds no adapter\.safetensors; name the folder of a run"):
        draw(GenerationConfig((str(adapter_file.parent.parent),), prompts=("a",)))


@pytest.mark.parametrize("spelling", ["{}", "{}/../dog/adapter.safetensors", "{}/link.safetensors"])
def test_the_same_adapter_twice_by_whatever_spelling(adapter_file, spelling):
    (adapter_file.parent / "link.safetensors").symlink_to(adapter_file)
    again = spelling.format(adapter_file.parent)
    with pytest.raises(UserError, match=r"is the same file as .*dog/adapter\.safetensors; give it once"):
        draw(GenerationConfig((str(adapter_file), again), prompts=("a",)))


def test_pictures_of_a_checkpoint_are_the_run_s(adapter_file):
    checkpoint = adapter_file.parent / "checkpoint-2"
    checkpoint.mkdir()
    (adapter_file.parent / "settings.yaml").touch()
    moved = adapter_file.rename(checkpoint / "adapter.safetensors")
    draw(GenerationConfig((str(checkpoint),), prompts=("a",), num_images=1))
    assert list(checkpoint.iterdir()) == [moved]
    ((_, metadata),) = pictures_in(adapter_file.parent / "images" / "checkpoint-2").values()
    assert metadata["adapters"][0]["name"] == "dog/checkpoint-2/adapter.safetensors"


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_is_loaded(adapter_file, monkeypatch):
    monkeypatch.setattr("gsoft_diffusion.sampling.drawing.load_base", None)
    with pytest.raises(UserError, match=r"--output_dir /dev/null/x: cannot be written \(Not a directory\)"):
        draw(GenerationConfig((str(adapter_file),), prompts=("a",), output_dir="/dev/null/x"))

    def read_only(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", read_only)
    with pytest.raises(UserError, match=r"dog/images: cannot be written \(Permission denied\)"):
        draw(GenerationConfig((str(adapter_file),), prompts=("a",)))
    assert list(adapter_file.parent.iterdir()) == [adapter_file]


def test_weights_are_of_the_type_that_was_trained_with():
    config = GenerationConfig(("adapter.safetensors",), prompts=("a",))

    def taken(config, trained: object) -> str:
        return _precision(config, SimpleNamespace(training={"mixed_precision": trained}))

    assert [taken(config, trained) for trained in ("no", "bf16", "fp16", "int4", None)] == [
        "no",
        "bf16",
        "fp16",
        "no",
        "no",
    ]
    assert taken(replace(config, mixed_precision="no"), "bf16") == "no"


def test_the_base_is_looked_for_where_the_run_s_settings_say(adapter_file, base, tmp_path, monkeypatch, capfd):
    """An adapter has its name only; from whatever directory."""
    file = read_adapter(adapter_file)
    adapter = SimpleNamespace(config=file.config, state_dict=lambda: file.tensors)
    identity = replace(file.base_model, name="v_prediction")
    save_adapter(adapter_file, adapter, base_model=identity, training=file.training, prompts=file.prompts)
    monkeypatch.chdir(tmp_path)
    config = GenerationConfig((str(adapter_file),), prompts=("a",), num_images=1)
    settings = adapter_file.parent / "settings.yaml"
    for text in ("", "pretrained_model_name_or_path: /elsewhere/another\n", "[1, 2"):
        settings.write_text(text)
        with pytest.raises(UserError, match=r"base model is v_prediction, as .*adapter\.safetensors says, which is"):
            draw(config)
    settings.write_text("pretrained_model_name_or_path: /elsewhere/v_prediction\n")
    with pytest.raises(UserError, match=r"is /elsewhere/v_prediction, as .*settings\.yaml says, which is not"):
        draw(config)
    settings.write_text(f"pretrained_model_name_or_path: {base}\n")
    capfd.readouterr()
    draw(config)
    assert f"base model: {base}, as {settings} says" in capfd.readouterr().out


def test_no_prompt_says_what_the_subject_is_called(adapter_file, tmp_path):
    with pytest.raises(UserError, match="a photo of a sks dog"):
        draw(GenerationConfig((str(adapter_file),)))
    with pytest.raises(UserError, match="a photo of a sks dog"):
        draw(GenerationConfig((str(adapter_file),), prompts=("  ",)))
    with pytest.raises(UserError, match=r"--prompts_file .*nowhere"):
        draw(GenerationConfig((str(adapter_file),), prompts_file=str(tmp_path / "nowhere")))


def test_a_base_that_has_moved(adapter_file, base, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    draw(GenerationConfig((str(adapter_file),), prompts=("a",), num_images=1, pretrained_model_name_or_path=str(moved)))
    with pytest.raises(UserError, match="no model folder"):
        draw(GenerationConfig((str(adapter_file),), prompts=("a",), pretrained_model_name_or_path="./nowhere"))


def test_a_sibling_of_the_base_draws_if_asked_for_and_pictures_say_so(adapter_file, base, tmp_path, caplog):
    sibling = shutil.copytree(base, tmp_path / "sibling")
    unet = load_model(str(base)).unet
    for parameter in unet.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim == 2 else 0
    unet.save_pretrained(sibling / "unet")
    config = GenerationConfig(
        (str(adapter_file),), prompts=("a",), num_images=1, pretrained_model_name_or_path=str(sibling)
    )
    with pytest.raises(UserError, match=r"has other weights, about .*; --accept_other_base takes it all the same"):
        draw(config)
    draw(replace(config, accept_other_base=True))
    assert len([message for message in caplog.messages if "has other weights, about" in message]) == 1
    ((_, facts),) = pictures_in(adapter_file.parent / "images").values()
    identity = identity_of(load_model(str(sibling)))
    assert facts["base_model"] == {"name": "sibling", "fingerprint": identity.fingerprint}


def test_side_by_side_each_adapter_draws_by_itself(base, adapter_file, tmp_path):
    # A run may be called as the base model's column is.
    paths = [adapter_file, write_adapter(base, tmp_path / "base" / "adapter.safetensors", 1, {})]
    common = {"prompts": ("a dog",), "num_images": 1}
    both = tuple(map(str, paths))
    draw(
        GenerationConfig(both, (1.0, 0.5), side_by_side=True, compare=True, output_dir=str(tmp_path / "out"), **common)
    )
    pictures = pictures_in(tmp_path / "out")
    found = {(facts["model"], len(facts["adapters"]), facts["adapters"][0]["name"]) for _, facts in pictures.values()}
    names = [f"{path.parent.name}/adapter.safetensors" for path in paths]
    assert found == {("adapter", 1, names[0]), ("adapter", 1, names[1]), ("base", 2, names[0])}
    for path, strength, name in zip(both, (1.0, 0.5), names, strict=True):
        alone = tmp_path / f"alone-{strength}"
        draw(GenerationConfig((path,), (strength,), output_dir=str(alone), **common))
        ((expected, _),) = pictures_in(alone).values()
        (drawn,) = (
            image
            for image, facts in pictures.values()
            if facts["model"] == "adapter" and facts["adapters"][0]["name"] == name
        )
        np.testing.assert_array_equal(drawn, expected)
    assert len(pictures) == 3
    assert {name.split("_")[2] for name in pictures} == {adapter_file.parent.name, "base-1", "base"}
    sheet = Image.open(tmp_path / "out" / "contact_sheet_0000.png")
    assert sheet.width == 8 + 3 * (216 + 8)  # three pictures of 36 pixels, each six times as large


@pytest.mark.parametrize(
    ("runs", "captions"),
    [
        (("adapter", "dog"), ["adapter", "dog", "base model"]),
        (("base", "base model"), ["base (1)", "base model (1)", "base model"]),
    ],
)
def test_every_run_s_name_is_on_sheets(tmp_path, runs, captions):
    """Whatever it is called, and none is taken for the base model."""
    paths = [tmp_path / run / "adapter.safetensors" for run in runs]
    config = GenerationConfig(tuple(map(str, paths)), side_by_side=True, compare=True)
    columns = _columns(config, [SimpleNamespace(path=path) for path in paths])
    assert [column.caption for column in columns] == captions
    assert len({column.mark for column in columns}) == 3


def test_side_by_side_of_one_adapter_is_refused():
    with pytest.raises(UserError, match="--side_by_side would have no effect: there is one adapter"):
        GenerationConfig(("a",), side_by_side=True)


def test_facts_of_a_picture_are_read_again(adapter_file):
    (sheet,) = draw(GenerationConfig((str(adapter_file),), prompts=("a dog",), num_images=1))
    (picture,) = (path for path in sheet.parent.glob("*.png") if path != sheet)
    assert read_facts(picture)["prompt"] == "a dog"
    picture.write_bytes(picture.read_bytes()[:40])
    assert read_facts(picture) == {}
