"""What the buttons of step 5 do, called as Gradio calls them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from page_folders import write_run
from tiny_families import write_flux, write_sd3

from gsoft_diffusion.adapters.file import save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.app.steps.take_home import FORMATS, PRECISION, Handlers
from gsoft_diffusion.config import AdapterConfig, ExportConfig
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.models.loading import load_model

ADAPTER = "dog/checkpoint-8/adapter.safetensors"


@pytest.fixture
def does(page) -> Handlers:
    return Handlers(page)


def test_formats_and_precisions_are_the_commands_own():
    hints = get_type_hints(ExportConfig)
    assert set(FORMATS) == set(get_args(hints["format"]))
    assert (PRECISION.choices, PRECISION.default) == (list(get_args(hints["precision"])), ExportConfig.precision)


@pytest.fixture
def folder(page) -> Path:
    """A run's, with a checkpoint."""
    place = write_run(page.workspace.root / "dog")
    (place / "checkpoint-8").mkdir()
    (place / "checkpoint-8" / "adapter.safetensors").write_bytes(b"123")
    return place


@pytest.mark.parametrize(
    ("kind", "precision", "name"),
    [
        ("kohya_lora", "float16", "kohya_lora_rank16_step-8.safetensors"),
        ("diffusers_lora", "float32", "diffusers_lora_rank16_step-8_float32.safetensors"),
        ("checkpoint", "float16", "merged_step-8.safetensors"),
        ("checkpoint", "float32", "merged_step-8_float32.safetensors"),
        ("checkpoint", "bfloat16", "merged_step-8_bfloat16.safetensors"),
        ("diffusers", "float16", "merged_step-8"),
        ("diff", "float16", "diff_step-8.safetensors"),
    ],
)
def test_a_name_says_what_was_made_of_which_step(page, does, folder, sleeping, kind, precision, name):
    assert does.asked(ADAPTER, kind, 16, precision) == ""
    job = page.jobs.current("dog", "export")
    assert read_yaml(job.folder / "settings.yaml")["output"] == str(folder / name)
    assert f"{name} is being made already" in does.asked(ADAPTER, kind, 16, precision)
    if kind == "diffusers":
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text("{}")
    else:
        (folder / name).write_bytes(b"12345")
    assert f"{name} is there already" in does.asked(ADAPTER, kind, 16, precision)
    assert len(page.jobs.all()) == 1
    _, files, *_ = does.watched(ADAPTER, [])
    assert f'href="/files/take/dog/{name}' in files


def test_only_formats_are_offered_that_the_base_model_can_have(does, folder, tmp_path, base):
    bases = {"sd": base, "sd3": write_sd3(tmp_path / "sd3"), "flux": write_flux(tmp_path / "flux")}
    offered = {}
    for name, place in bases.items():
        model = load_model(str(place))
        identity = identity_of(model)
        adapter = inject(AdapterConfig(nblocks=4), model.denoiser, model.text_encoders)
        path = folder / "checkpoint-8" / "adapter.safetensors"
        save_adapter(path, adapter, base_model=identity, training={}, prompts={})
        update = does.offered(ADAPTER, "kohya_lora")
        offered[name] = [kind for _, kind in update["choices"]]
        assert update["value"] == ("checkpoint" if name == "sd3" else "kohya_lora")
    assert offered["sd"] == list(FORMATS)
    assert offered["sd3"] == [kind for kind in FORMATS if kind != "kohya_lora"]
    assert offered["flux"] == [kind for kind in FORMATS if kind != "checkpoint"]
    shutil.rmtree(bases["flux"])
    assert len(does.offered(ADAPTER, "diff")["choices"]) == len(FORMATS)  # the export will say that it is not there
    assert does.offered(None, "diff")["value"] == "diff"


def test_every_format_says_where_it_goes(does, folder):
    names = ["kohya_lora_rank8.safetensors", "diffusers_lora_rank8.safetensors", "diff.safetensors"]
    for name in (*names, "merged_step-8.safetensors", "rex_rank16.safetensors", "merged_v1.2.safetensors"):
        (folder / name).write_bytes(b"1")
    (folder / "merged_step-8").mkdir()
    _, files, *_ = does.watched(ADAPTER, [])
    assert files.count("<tr>") == 1 + len(FORMATS)
    for goes in ("node Load LoRA", "load_lora_weights", "where a LoRA goes", "Load Checkpoint", "from_pretrained"):
        assert files.count(goes) == 1
    assert "rex_rank16" not in files  # of another program, or by another name: it cannot be downloaded
    assert "v1.2" not in files


def test_a_checkpoint_that_goes_away_leaves_the_other_files(does, folder):
    (folder / "diff.safetensors").write_bytes(b"1")
    shutil.rmtree(folder / "checkpoint-8")
    _, files, *_ = does.watched(ADAPTER, [])
    assert files.count("<tr>") == 1


def test_what_an_export_loses_is_said_when_it_is_done(page, does, folder, sleeping):
    does.asked(ADAPTER, "kohya_lora", 16, "float16")
    job = page.jobs.current("dog", "export")
    (job.folder / "log.txt").write_text(f"loading\n{folder}/kohya.safetensors: it loses 84%\nnote: for others\n")
    (job.folder / "end.json").write_text('{"status": 0}')
    state, *_ = does.watched(ADAPTER, [])
    assert "kohya.safetensors: it loses 84%" in state
    assert "note: for others" in state
    assert "loading" not in state
    assert str(folder) not in state
    does.asked(ADAPTER, "diff", 16, "float16")
    state, *_ = does.watched(ADAPTER, [])
    assert "kohya.safetensors: it loses 84%" in state  # also while another is made
    assert "diff_step-8.safetensors: " in state


def test_the_card_says_nothing_of_pictures_that_are_not_shown(does, folder):
    (folder / "README.md").write_text(
        "# A dog\n\n![A sheet](a%20b.png)\n\n*Prompts, and what was drawn.*\n\nIt is *a* dog.\n"
    )
    assert does.watched(ADAPTER, [])[2] == "# A dog\n\n\n\nIt is *a* dog.\n"


def test_the_export_that_is_made_is_stopped_though_another_waits(page, does, folder, sleeping):
    for kind in ("kohya_lora", "diff"):
        does.asked(ADAPTER, kind, 16, "float16")
    assert does.watched(ADAPTER, [])[3]["interactive"]
    does.stopped(ADAPTER)
    assert [(job.folder / "stop.json").is_file() for job in page.jobs.all()] == [True, False]
