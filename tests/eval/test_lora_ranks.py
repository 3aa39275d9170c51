"""The study of LoRAs by rank, on tiny random models."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from tiny_eval import write_world
from tiny_models import randomise

from eval import lora_ranks
from eval.lora_ranks import added, study, validation_prompts
from gsoft_diffusion.adapters.file import read_adapter, save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config.adapter import AdapterConfig
from gsoft_diffusion.config.export import ExportConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.export import export
from gsoft_diffusion.publish.low_rank import LoraLayer
from gsoft_diffusion.scoring.encoders import load_encoders

FULL = 32  # the tiny base's largest width
PROMPTS = ["a sks dog", "a sks dog on the beach"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def adapter(world):
    model = load_model(str(world / "base"))
    identity = identity_of(model)
    adapter = inject(AdapterConfig(nblocks=4), model.denoiser, model.text_encoders)
    randomise(adapter, size=0.3)
    path = world / "dog" / "adapter.safetensors"
    path.parent.mkdir()
    training = {"sampler": {"num_inference_steps": 2}, "validation_prompts": PROMPTS}
    save_adapter(path, adapter, base_model=identity, training=training, prompts={})
    return path


@pytest.fixture(scope="module")
def result(world, adapter):
    encoders = load_encoders(str(world / "mini_clip"), str(world / "mini_dino"))
    return study(adapter, [1, 8, FULL], [], 2, encoders)[0]


def test_higher_ranks_lose_less_and_full_rank_nothing(result):
    """Pictures of the full rank are the adapter's only if each rank starts from the base model again."""
    errors = [row["error"] for row in result["ranks"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] < 1e-3  # rounded to half precision
    for name in ("pixels", "dino", "clip"):
        distances = [row["distance"][name] for row in result["ranks"]]
        assert distances[-1] < 0.2 * distances[0]
        assert distances[-1] < 0.2 * result["base_distance"][name]
    assert all(len(row["pictures"]["dino"]) == len(PROMPTS) * 2 for row in result["ranks"])


def test_errors_are_those_of_the_export(result, adapter, tmp_path):
    path = export(ExportConfig((str(adapter),), "kohya_lora", output=str(tmp_path / "lora.safetensors"), rank=8))
    with path.with_suffix(".csv").open() as file:
        exported = {row["layer"]: float(row["error"]) for row in csv.DictReader(file)}
    assert result["ranks"][1]["layers"] == pytest.approx(exported, rel=1e-3, abs=1e-3)


def test_a_lora_is_in_the_weights_for_a_while_only():
    weights = {"a": torch.ones(2, 2)}
    layer = LoraLayer("a", 1.0, 1.0, 0.0, torch.ones(2, 1), torch.ones(1, 2))
    with added([layer], weights):
        assert weights["a"].eq(2).all()
    assert weights["a"].eq(1).all()


def test_the_command_writes_figures_a_plot_and_pictures(world, adapter, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "dog"
    encoders = ["--clip", str(world / "mini_clip"), "--dino", str(world / "mini_dino")]
    arguments = ["--adapter", str(adapter), "--out", str(out), "--ranks", "4", "2", "--seeds", "1", *encoders]
    monkeypatch.setattr(sys, "argv", ["lora_ranks", *arguments])
    assert lora_ranks.main() == 0
    written = json.loads((out / "ranks.json").read_text())
    assert [row["rank"] for row in written["ranks"]] == [2, 4]
    assert written["prompts"] == PROMPTS
    assert str(world) not in json.dumps({name: value for name, value in written.items() if name != "encoders"})
    assert (out / "ranks.svg").stat().st_size > 1000
    assert (out / "contact_sheet.png").is_file()
    assert "rank    2: loses" in capsys.readouterr().out
    monkeypatch.setattr(lora_ranks, "study", lambda *arguments: pytest.fail("worked in vain"))
    with pytest.raises(UserError, match="exists and is not overwritten: choose another name with --out"):
        lora_ranks.main()


def test_a_sibling_of_the_base_if_asked_for(world, adapter, tmp_path, monkeypatch, caplog):
    sibling = shutil.copytree(world / "base", tmp_path / "sibling")
    model = load_model(str(sibling))
    for parameter in model.denoiser.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim == 2 else 0
    model.denoiser.save_pretrained(sibling / "unet")
    out = tmp_path / "results"
    arguments = ["--adapter", str(adapter), "--out", str(out), "--ranks", "2", "--seeds", "1", "--prompts", "a"]
    arguments += ["--clip", str(world / "mini_clip"), "--dino", str(world / "mini_dino")]
    arguments += ["--pretrained_model_name_or_path", str(sibling)]
    monkeypatch.setattr(sys, "argv", ["lora_ranks", *arguments])
    with pytest.raises(UserError, match="--accept_other_base takes it all the same"):
        lora_ranks.main()
    monkeypatch.setattr(sys, "argv", ["lora_ranks", *arguments, "--accept_other_base"])
    assert lora_ranks.main() == 0
    assert "has other weights, about" in caplog.text
    written = json.loads((out / "ranks.json").read_text())["base_model"]
    assert written == {"name": "sibling", "fingerprint": identity_of(load_model(str(sibling))).fingerprint}


def test_an_adapter_that_changes_nothing_has_nothing_to_lose(world, tmp_path):
    model = load_model(str(world / "base"))
    identity = identity_of(model)
    adapter = inject(AdapterConfig(nblocks=4), model.denoiser, model.text_encoders)
    save_adapter(tmp_path / "adapter.safetensors", adapter, base_model=identity, training={}, prompts={})
    encoders = load_encoders(str(world / "mini_clip"), str(world / "mini_dino"))
    with pytest.raises(UserError, match="does not change the base model"):
        study(tmp_path / "adapter.safetensors", [1], PROMPTS, 1, encoders)


def test_prompts_must_come_from_somewhere(adapter):
    assert validation_prompts(read_adapter(adapter)) == PROMPTS
    with pytest.raises(UserError, match=r"adapter\.safetensors: names no .* give --prompts"):
        validation_prompts(replace(read_adapter(adapter), training={}))
