"""The change of the weights as it is: what is written, under which names, and what is said before."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import WRITERS
from tiny_models import randomise
from torch import Tensor, nn

from gsoft.linear_slice import LinearSlice
from gsoft_diffusion.adapters.file import save_adapter
from gsoft_diffusion.adapters.identity import identity_of
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config import AdapterConfig, ExportConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import FAMILIES
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.publish.export import export
from gsoft_diffusion.publish.full_difference import difference_name


def write_adapter(base: Path, path: Path) -> Path:
    model = load_model(str(base))
    identity = identity_of(model)
    config = AdapterConfig(nblocks=4, text_encoder=bool(model.text_encoders))
    adapter = inject(config, model.denoiser, model.text_encoders)
    randomise(adapter, size=0.1)
    save_adapter(path, adapter, base_model=identity, training={}, prompts={"instance_prompt": "a sks dog"})
    return path


def changes(adapter: Path, base: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """`W' − W` of every layer, by the names in the export."""
    model = load_model(str(base))
    loaded, _ = load_adapter(adapter, model.denoiser, model.text_encoders, strength=strength)
    found = {}
    for name, linear, rotated in loaded.layers():
        change = rotated.rotated_weight(linear.weight) - linear.weight
        if isinstance(linear, LinearSlice) and linear.dim == 1:  # the first columns of a matrix
            change = torch.cat([change, torch.zeros_like(linear.whole.weight[:, linear.length :])], dim=1)
        found[difference_name(model, name, linear)] = change
    return found


@pytest.mark.parametrize(("precision", "rounds"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_change_is_there(family, precision, rounds, tmp_path, capfd):
    base = WRITERS[family](tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter.safetensors")
    path = export(ExportConfig((str(adapter),), "diff", precision=precision))
    assert path == tmp_path / "diff.safetensors"
    found, wanted = load_file(path), changes(adapter, base)
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert found[name].dtype == getattr(torch, precision)
        tolerance = 1e-6 if precision == "float32" else rounds * change.abs().max().item()
        torch.testing.assert_close(found[name].float(), change, atol=tolerance, rtol=0)
    said = capfd.readouterr().out
    (size,) = re.findall(r"^writing ([\d.,]+) MB$", said, re.MULTILINE)
    assert float(size) == pytest.approx(path.stat().st_size / 1e6, abs=0.1)
    assert f"full differences, {precision}; " in said
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(wanted)
    assert all(0 <= float(row["error"]) < max(rounds, 1e-3) for row in rows)
    assert "at strength 1" in path.with_suffix(".md").read_text()


def test_the_strength_goes_in(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter.safetensors")
    path = export(ExportConfig((str(adapter),), "diff", strength=(0.5,), precision="float32"))
    for name, change in changes(adapter, base, 0.5).items():
        torch.testing.assert_close(load_file(path)[name], change, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("unet.mid_block.attentions.0.attn1.to_out", "lora_unet_mid_block_attentions_0_attn1_to_out_0.diff"),
        ("text_encoder.layers.3.q_proj", "lora_te_text_model_encoder_layers_3_self_attn_q_proj.diff"),
    ],
)
def test_names_in_a_unet_are_kohyas(base, layer, name):
    assert difference_name(load_model(str(base)), layer, nn.Linear(2, 2)) == name


def test_names_in_a_transformer_are_diffusers():
    model, linear = SimpleNamespace(denoiser=object()), nn.Linear(4, 6)
    name = difference_name(model, "transformer.transformer_blocks.3.attn.to_out", linear)
    assert name == "transformer.transformer_blocks.3.attn.to_out.0.diff"
    block = "transformer.single_transformer_blocks.3.attn"
    assert difference_name(model, f"{block}.to_k", LinearSlice(linear, 0, 2, 2)) == f"{block}.to_k.diff"
    assert difference_name(model, f"{block}.to_out", LinearSlice(linear, 1, 0, 2)) == f"{block}.to_out.diff"


def test_a_full_disk_is_found_before_the_work(base, tmp_path, monkeypatch):
    adapter = write_adapter(base, tmp_path / "adapter.safetensors")
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    monkeypatch.setattr("gsoft_diffusion.publish.full_difference.tqdm", lambda *a, **k: pytest.fail("worked in vain"))
    with pytest.raises(
        UserError, match=r"--format diff: its file takes 0\.\d MB, and 0\.0 MB are free in .*; make room"
    ):
        export(ExportConfig((str(adapter),), "diff"))
    assert set(tmp_path.iterdir()) == before


def test_numbers_too_large_for_float16(base, tmp_path):
    huge = shutil.copytree(base, tmp_path / "huge")
    model = load_model(str(base))
    for name, parameter in model.unet.named_parameters():
        if name.endswith("attn1.to_q.weight"):
            parameter.data *= 1e7
    model.unet.save_pretrained(huge / "unet")
    adapter = write_adapter(huge, tmp_path / "adapter.safetensors")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"attn1\.to_q does not fit into float16: give --precision bfloat16 or float32"):
        export(ExportConfig((str(adapter),), "diff"))
    assert set(tmp_path.iterdir()) == before
