"""What ours are measured against has the faults that were published, and ours do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import gsoft
from benchmarks import convolution_faults
from benchmarks.convolution_faults import dead_inputs, dead_numbers, singular_values
from benchmarks.published_convolutions import PublishedConv2d

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE, GROUPS = (16, 32, 3, 2), (4, None)


def test_half_of_a_published_layer_of_stride_2_is_dead():
    torch.manual_seed(0)
    published, ours = PublishedConv2d(*SHAPE, groups=GROUPS), gsoft.GSConv2d(*SHAPE, groups=GROUPS)
    assert dead_inputs(published, 16) == 0.5
    assert dead_inputs(ours, 16) == 0
    dead, numbers = dead_numbers(published, 16)
    assert 0.5 < dead / numbers < 0.52
    assert dead_numbers(ours, 16) == (0, ours.spatial.free.numel())


def test_a_published_layer_is_not_orthogonal_before_its_first_step():
    torch.manual_seed(0)
    published, ours = PublishedConv2d(*SHAPE, groups=GROUPS).eval(), gsoft.GSConv2d(*SHAPE, groups=GROUPS).eval()
    assert singular_values(published, 16).max() > 1.1
    assert (singular_values(ours, 16) - 1).abs().max() < 4e-6
    published.train()(torch.randn(1, 16, 4, 4))
    assert (singular_values(published.eval(), 16) - 1).abs().max() < 1e-5


def test_the_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "faults.json"
    monkeypatch.setattr(sys, "argv", ["convolution_faults", "--width", "4", "--out", str(path)])
    monkeypatch.setattr(convolution_faults, "shapes", lambda depth, width: [(8, 8, 3, 1, 8), (8, 16, 3, 2, 8)])
    convolution_faults.main()
    published, ours = json.loads(path.read_text())
    assert published["dead_numbers"] == pytest.approx(0.4, abs=0.1)
    assert (ours["dead_numbers"], ours["dead_inputs_at_stride_2"]) == (0, 0)
    assert ours["fresh_singular_values"] == pytest.approx([1, 1], abs=4e-6)
    assert "| (4,–) | 0% | 0% |" in capsys.readouterr().out


def test_the_page_has_the_committed_table():
    records = json.loads((REPOSITORY / "benchmarks" / "results" / "convolution_faults.json").read_text())
    assert convolution_faults.report(records) in (REPOSITORY / "docs" / "lipconvnet.md").read_text()
