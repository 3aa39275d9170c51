"""The speed of orthogonal convolutions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import gsoft
from benchmarks import orthogonal_convolutions
from benchmarks.orthogonal_convolutions import KINDS, shapes
from benchmarks.published_convolutions import PublishedConv2d
from gsoft.blocks import skew_symmetric

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_published_soc_is_the_same_map_as_ours():
    """With equal kernels, in evaluation mode; the bound that ours is scaled by may be larger, so radii differ."""
    torch.manual_seed(0)
    ours, published = gsoft.SOCConv2d(4, 4, 1).eval(), PublishedConv2d(4, 4, 1)
    x = torch.randn(2, 4, 4, 4)
    free = ours.spatial.free.detach() / 2**0.5
    with torch.no_grad():
        published.spatial.weight.copy_(skew_symmetric(free, 4)[0, :, :, None, None])
    published(x)  # its vectors have to find the norm first
    kernel = ours.spatial.kernel()
    ratio = torch.linalg.matrix_norm(kernel[:, :, 0, 0], ord=2)
    assert 0.97 < ratio <= 1
    ours.spatial.radius = 1 / ratio.item()
    torch.testing.assert_close(ours(x), published.eval()(x), atol=1e-5, rtol=1e-5)


def test_shapes_are_those_of_the_network():
    found = shapes(15, 32)
    assert len(found) == 14
    assert found[0] == (32, 32, 3, 1, 32)
    assert found[1] == (32, 64, 3, 2, 32)
    assert found[-1] == (512, 1024, 1, 2, 2)


def test_measures_every_layer_and_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    options = f"--depth 5 --width 8 --batch_size 2 --repetitions 2 --clock cpu --out {path}"
    monkeypatch.setattr(sys, "argv", ["orthogonal_convolutions", *options.split()])
    orthogonal_convolutions.main()
    printed, content = capsys.readouterr().out, json.loads(path.read_text())
    assert [tuple(record["shape"]) for record in content["records"]] == shapes(5, 8)
    assert all(set(record["seconds"]) == set(KINDS) for record in content["records"])
    assert "| SOC as published |" in printed
    orthogonal_convolutions.main()
    assert capsys.readouterr().out == printed
    assert json.loads(path.read_text()) == content


def test_the_table_is_of_times_that_were_measured_together():
    layers = [(1, 1, 1, 1, 1), (2, 2, 1, 1, 1)]
    seconds = {name: [1.0, 2.0] for name in KINDS} | {"SOC": [4.0, 6.0]}
    records = [{"shape": list(layer), "seconds": seconds} for layer in layers]
    assert "| (4,–) | 3.00 | 3.50 (3.25 to 3.75) | 1.00 (1.00 to 1.00) |" in orthogonal_convolutions.report(
        records, layers
    )


def test_the_page_has_the_committed_table_and_beats_the_papers_speed_up():
    content = json.loads((REPOSITORY / "benchmarks" / "results" / "orthogonal_convolutions.json").read_text())
    settings = content["settings"]
    table = orthogonal_convolutions.report(content["records"], shapes(settings["depth"], settings["width"]))
    assert table in (REPOSITORY / "docs" / "lipconvnet.md").read_text()
    (row,) = (line for line in table.splitlines() if line.startswith("| (4,–) |"))
    assert float(row.split("|")[3].split()[0]) > 1.64
