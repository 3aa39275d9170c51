"""What stands in a model card, and that it is fit for others to read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import write_base
from huggingface_hub import ModelCard
from tiny_families import write_flux, write_flux2_klein, write_sd3, write_z_image

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.adapters.file import AdapterFile
from gsoft_diffusion.config import AdapterConfig, TrainingConfig
from gsoft_diffusion.foundation.run_folder import latest_sheet, sheet_of
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.model_card import LOADING, MARK, may_write, public_base
from gsoft_diffusion.publish.model_card import model_card as model_card_of

DOG = {"instance_prompt": "a photo of a sks dog", "unique_token": "sks", "class_word": "dog"}
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def adapter_file(name: str = SD15, prompts: dict | None = None, **training) -> AdapterFile:
    settings = (
        TrainingConfig("photos", class_word="dog", learning_rate=2e-5, seed=7).to_dict() | {"step": 300} | training
    )
    identity = BaseModelIdentity(name, "0123456789abcdef")
    return AdapterFile(Path("adapter.safetensors"), AdapterConfig(nblocks=32), identity, settings, prompts or DOG, {})


class BaseModel:
    """What a card asks of a base model: SDXL's."""

    pipeline = "StableDiffusionXLPipeline"
    unet, text_encoder, text_encoder_2, vae = (object() for _ in range(4))
    denoiser, text_encoders = unet, (text_encoder, text_encoder_2)

    def parts(self) -> tuple[str, ...]:
        return "vae", "text_encoder", "text_encoder_2", "unet"


def model_card(*arguments, **options) -> str:
    return model_card_of(*arguments, model=BaseModel(), **options)


def parts(card: str) -> tuple[dict, str]:
    assert card.startswith("---\n")
    front, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert not any(line.strip() == "---" for line in front.splitlines())  # which some readers would take for the end
    return yaml.safe_load(front), text


def test_front_matter_is_hugging_faces():
    card = model_card("adapter", "adapter.safetensors", [adapter_file()], picture="validation/step-000300.png")
    front, text = parts(card)
    assert (front["base_model"], front["base_model_relation"]) == (SD15, "adapter")
    assert front["instance_prompt"] == "a photo of a sks dog"
    assert (front["pipeline_tag"], front["library_name"]) == ("text-to-image", "gsoft-diffusion")
    assert "license" not in front
    assert "# sks dog\n" in text
    assert "](validation/step-000300.png)" in text
    assert ModelCard(card).data.base_model == SD15


@pytest.mark.parametrize("kind", LOADING)
def test_every_kind_says_how_to_load_it(kind):
    card = model_card(kind, "result", [adapter_file()])
    front, text = parts(card)
    named = 'from_pretrained(".")  # or this repository\'s name on the hub' if kind == "diffusers" else "result"
    assert named in text.partition("## How to load")[2].partition("## How it was made")[0]
    assert ("result" in text) == (kind != "diffusers")
    assert "{" not in text
    assert ("lora" in front["tags"]) == kind.endswith("_lora")
    assert ("StableDiffusionXLPipeline.from_single_file" in text) == (kind == "checkpoint")
    all_parts = "pipeline.unet, [pipeline.text_encoder, pipeline.text_encoder_2])"
    assert (all_parts in text) == (kind == "adapter")


@pytest.mark.parametrize(
    ("write", "programs"),
    [
        (write_base, {"adapter": "ComfyUI and Forge", "checkpoint": "ComfyUI and Forge"}),
        (write_sd3, {"adapter": "ComfyUI", "checkpoint": "ComfyUI", "diff": "ComfyUI"}),
        (write_flux, {"adapter": "ComfyUI and Forge", "kohya_lora": "ComfyUI and Forge", "diff": "ComfyUI and Forge"}),
        (write_flux2_klein, {"adapter": "ComfyUI", "kohya_lora": "ComfyUI"}),
        (write_z_image, {"adapter": "ComfyUI", "kohya_lora": "musubi-tuner, whose conversion makes it ComfyUI's,"}),
    ],
)
def test_only_programs_are_named_that_know_the_family(tmp_path, write, programs):
    model = load_model(str(write(tmp_path / "base")))
    for kind, names in programs.items():
        assert f"In {names} among the" in model_card_of(kind, "result", [adapter_file()], model=model)


def test_a_picture_with_a_space_in_its_name_is_shown():
    card = model_card("diff", "my dog.safetensors", [adapter_file()], picture="my dog (2).png")
    assert "![A contact sheet](my%20dog%20%282%29.png)" in card


def test_settings_are_listed():
    _, text = parts(model_card("adapter", "a", [adapter_file(with_prior_preservation=True)]))
    for row in (
        "| base model | stable-diffusion-v1-5/stable-diffusion-v1-5 |",
        "| method | Double GSOFT, 32 blocks, 2 factors, scaled cayley, a scale for each output |",
        "| steps | 300 |",
        "| learning rate | 2e-05 |",
        "| prior preservation | yes |",
        "| seed | 7 |",
    ):
        assert row in text
    assert "min-SNR" not in text
    predicted = adapter_file(with_prior_preservation=True, prior_target="base_prediction")
    assert (
        "| prior preservation | by the base model's predictions |" in parts(model_card("adapter", "a", [predicted]))[1]
    )


def test_several_adapters_and_subjects():
    mug = adapter_file(prompts={"subjects": [{"unique_token": "zwx", "class_word": "mug", "instance_prompt": "zwx"}]})
    _, text = parts(model_card("diffusers", "merged", [adapter_file(), mug], [1.0, 0.6]))
    assert "# sks dog, zwx mug" in text
    assert "`a photo of a sks dog`, `zwx`" in text
    assert text.count("| strength |") == 1
    assert "| strength | 0.6 |" in text


@pytest.mark.parametrize(
    ("name", "hub", "shown"),
    [
        (SD15, SD15, SD15),
        ("data/mini_base", None, "the miniature base model bundled with gsoft-diffusion"),
        ("/home/ann/models/sd15", None, "sd15"),
        ("~/models/sd15", None, "sd15"),
        ("../ann/sd15", None, "sd15"),
        ("./sd15", None, "sd15"),
        ("/home/ann/models/sd15.safetensors", None, "sd15.safetensors"),
        ("/", None, "a model without a name"),
    ],
)
def test_base_models_are_named_without_folders(name, hub, shown):
    assert public_base(name) == (hub, shown)


def test_a_folder_that_looks_like_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann" / "sd15").mkdir(parents=True)
    assert public_base("ann/sd15") == (None, "sd15")


@pytest.mark.parametrize("kind", LOADING)
def test_no_private_paths(kind):
    private = {"pretrained_model_name_or_path": "/home/ann/sd15", "note": "/home/ann"}
    card = model_card(kind, "result", [adapter_file("/home/ann/sd15", **private)])
    assert "ann" not in card.replace("anno", "")
    assert not {"base_model", "base_model_relation"} & parts(card)[0].keys()


BAD = 'x"`\n---\nlicense: mit\n# <script>alert(1)</script> | [a](b) \\'


@pytest.mark.parametrize("kind", LOADING)
@pytest.mark.parametrize(
    "bad", [BAD, BAD * 20, "```\n" + BAD, "x" * 80 + " --- " + "x" * 80 + BAD], ids=["short", "long", "fence", "line"]
)
def test_texts_of_strangers_stay_texts(kind, bad):
    """Adapter files come from anywhere: their prompts must not become markup, code or front matter."""
    prompts = dict.fromkeys(("instance_prompt", "unique_token", "class_word"), bad)
    card = model_card(kind, "merged", [adapter_file(prompts=prompts, optimizer=bad, seed=bad)])
    front, text = parts(card)
    assert "license" not in front
    assert " ".join(bad.split()) == " ".join(front["instance_prompt"].split())
    assert "\n---\n" not in text
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert sorted(blocks) == {"adapter": ["bash", "python"], "diff": []}.get(kind, ["python"])
    if "python" in blocks:
        compile(blocks["python"], "card", "exec")
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"\\[\\`\[\]<>|]", "", outside))  # what Markdown shows as it is
    assert "`" not in outside
    assert "<script" not in outside
    assert re.findall(r"\]\((.*?)\)", outside) == ["https://arxiv.org/abs/2406.10019"]
    assert all(line.count("|") == 3 for line in outside.splitlines() if line.startswith("| "))


@pytest.mark.parametrize(
    "prompt", ["a sks dog", "$HOME $(id) `id` \\ ! 'x' \"y\"", BAD, "a\x0fb\x1b[2J", "", "dog " * 200]
)
def test_a_shell_passes_the_prompt_on_as_it_is(prompt):
    _, text = parts(model_card("adapter", "adapter.safetensors", [adapter_file(prompts={"instance_prompt": prompt})]))
    (line,) = text.partition("```bash\n")[2].partition("\n```")[0].splitlines()
    said = subprocess.run(
        ["bash", "-c", line.replace("python inference.py", r"printf '%s\n'")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wanted = " ".join(prompt.replace("\x0f", " ").replace("\x1b", " ").split())
    assert said == f"--adapter\nadapter.safetensors\n--prompt\n{wanted}\n"


def test_long_prompts_are_whole_where_they_are_used_and_end_in_an_ellipsis_where_they_are_read():
    prompt = " ".join(f"word{number}" for number in range(100))
    for kind in LOADING:
        front, text = parts(model_card(kind, "a", [adapter_file(prompts={"instance_prompt": prompt})]))
        assert front["instance_prompt"] == prompt
        loading = text.partition("## How to load")[2].partition("## How it was made")[0]
        assert prompt in loading
        title = text.partition("# ")[2].partition("\n")[0]
        assert title == prompt[:199] + "…"


def test_a_card_that_someone_has_made_their_own_stays(tmp_path):
    path = tmp_path / "README.md"
    assert may_write(path)
    card = model_card("adapter", "a", [adapter_file()])
    path.write_text(card)
    assert may_write(path)
    path.write_text(card.replace(MARK, ""))
    assert not may_write(path)
    path.write_bytes(b"\xff\xfe")
    assert not may_write(path)


def test_latest_sheet(tmp_path):
    assert latest_sheet(tmp_path) is None
    (tmp_path / "validation").mkdir()
    for step in (250, 1000, 500):
        (tmp_path / "validation" / f"step-{step:06d}.png").touch()
    sheet_of(tmp_path, 1000, 2).touch()  # the second of that step
    assert latest_sheet(tmp_path) == tmp_path / "validation" / "step-001000.png"
    assert latest_sheet(tmp_path, 700) == tmp_path / "validation" / "step-000500.png"
    assert latest_sheet(tmp_path, 7) is None


def test_a_subject_without_a_known_token_goes_by_its_prompt():
    _, text = parts(
        model_card("adapter", "a", [adapter_file(prompts={"class_word": "dog", "instance_prompt": "my dog"})])
    )
    assert "# my dog\n" in text
