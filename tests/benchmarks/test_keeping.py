"""The measurement of what keeps the subject and what keeps the class."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import few_steps

from benchmarks.keeping import DECAYS, PRIORS, report, watched
from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.training.train import train

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "keeping.json"


def test_a_run_is_watched(base, photos, tmp_path):
    with watched() as seen:
        adapter = train(few_steps(base, photos, tmp_path / "run")).adapter
    assert len(seen.steps) == 3
    assert list(seen.averages) == list(DECAYS)
    last = read_adapter(adapter).tensors
    for average in seen.averages.values():
        assert average.keys() == last.keys()
        assert any(not torch.equal(average[name], last[name]) for name in last)


def test_the_report_of_the_committed_measurements():
    records = json.loads(RESULTS.read_text())["records"]
    assert {record["prior"] for record in records} == set(PRIORS)
    lines = report(records).splitlines()
    for prior in PRIORS:
        rows = [record for record in records if record["prior"] == prior]
        balance = sum(row["balance"] for row in rows) / len(rows)
        assert any(line.startswith(f"| {prior} | {balance:.3f} |") for line in lines)


@pytest.mark.parametrize("prior", PRIORS)
def test_what_the_priors_stand_for(base, photos, tmp_path, prior):
    config = replace(few_steps(base, photos, tmp_path), **PRIORS[prior])
    assert (config.with_prior_preservation, config.predicts_prior) == (prior != "none", prior == "base_prediction")
