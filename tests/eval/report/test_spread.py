"""How far differences scatter over subjects."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_eval import experiment, grid

from eval.benchmark import plan
from eval.report.spread import spread_of_differences
from eval.results import read_results
from gsoft_diffusion import UserError


def with_balances(finished, out, balances):
    """A copy of the results in which Double GSOFT scores so on each subject, and LoRA 0.5 on all."""
    out.mkdir()
    shutil.copy(finished / "experiment.yaml", out)
    results = list(read_results(finished).values())
    for result in results:
        cell = result["cell"]
        share = balances[cell["subject"]] if cell["method"] == "double_gsoft" else 0.5
        if cell["method"] == "base":
            result["scores"] |= {"dino": 0.0, "clip_t": 1.0}
            result["photos"] |= {"dino": 1.0, "clip_t": 0.0}
        else:
            for scores in (result["scores"], *result["curve"]):
                scores |= {"dino": share, "clip_t": share}
    (out / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    return out


def test_it_is_the_deviation_of_paired_differences(world, finished_grid, tmp_path):
    out = with_balances(finished_grid, tmp_path / "out", {"rex": 0.7, "cup": 0.5})
    assert spread_of_differences(out) == pytest.approx(0.2 / 2**0.5)  # of the differences 0.2 and 0
    text = plan(grid(world), tmp_path / "none", workers=1, earlier=out)
    least = (12.7062 + 1.3764) * 0.2 / 2**0.5 / 2**0.5  # one degree of freedom
    assert f"detectable difference in balance: {least:.3f} (80% power at 5 %, two-sided, 2 subjects" in text
    assert f"over subjects 0.141, as in {out})" in text


def test_without_earlier_results_the_settings_say(world, tmp_path):
    text = plan(experiment(world, difference_sd=0.2), tmp_path, workers=1)
    assert "standard deviation of differences over subjects 0.200, as difference_sd says" in text
    alone = plan(experiment(world, subjects=["rex"]), tmp_path, workers=1)
    assert "detectable difference: none, since one subject says nothing of others" in alone


def test_a_folder_that_says_nothing_of_differences_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no experiment\.yaml of a comparison; give a folder"):
        spread_of_differences(tmp_path)
