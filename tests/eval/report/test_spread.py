"""How far differences scatter over subjects."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_eval import experiment, grid

from eval.plan import plan
from eval.report.intervals import detectable_by
from eval.report.spread import reach_of_intervals, spread_of_differences
from eval.results import read_results
from gsoft_diffusion import UserError


def with_scores(finished, out, shares):
    """A copy of the results in which Double GSOFT has such DINO and CLIP-T on each subject, and LoRA 0.5 on all."""
    out.mkdir()
    shutil.copy(finished / "experiment.yaml", out)
    results = list(read_results(finished).values())
    for result in results:
        cell = result["cell"]
        share = shares[cell["subject"]] if cell["method"] == "double_gsoft" else 0.5
        pair = {"dino": 0.0, "clip_t": 1.0} if cell["method"] == "base" else {"dino": share, "clip_t": share}
        if cell["method"] == "base":
            result["photos"] |= {"dino": 1.0, "clip_t": 0.0}
            result["photos"]["clip_t_by_caption"] = dict.fromkeys(result["photos"]["clip_t_by_caption"], 0.0)
        for scores in (result["scores"], *result["pictures"], *result.get("curve", [])):
            scores |= pair
            for name, value in pair.items():
                if "pictures" in scores:
                    scores["pictures"][name] = [value] * len(result["pictures"])
    (out / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    return out


def test_it_is_the_deviation_of_leads(world, finished_grid, tmp_path):
    out = with_scores(finished_grid, tmp_path / "out", {"rex": 0.7, "cup": 0.5})
    lead = (1 - 3 / 7) * 0.25  # of a line from the base model's point to (0.7, 0.7) over one to (0.5, 0.5), up to 0.5
    assert spread_of_differences(out, grid=True) == pytest.approx(lead / 2**0.5)  # without the other subject it is 0
    with pytest.raises(UserError, match="is a grid, so its spread is not that of this comparison"):
        spread_of_differences(out, grid=False)
    text = plan(grid(world), tmp_path / "none", workers=1, earlier=out)
    half, subjects = reach_of_intervals(out)
    assert subjects == 2
    least = detectable_by(half, 2)
    assert least > half
    assert f"detectable difference in lead: {least:.3f} (80% power at 5 %, two-sided, 2 subjects, 2 seeds" in text
    words = f"over subjects {lead / 2**0.5:.3f}, as in {out}; by its intervals, which reach {half:.3f} to either side"
    assert words in text


def test_without_earlier_results_the_settings_say(world, tmp_path):
    text = plan(experiment(world, difference_sd=0.2, seeds=2), tmp_path, workers=1)
    assert "detectable difference in balance" in text
    assert "standard deviation of differences over subjects 0.200, as difference_sd says" in text
    alone = plan(experiment(world, subjects=["rex"]), tmp_path, workers=1)
    assert "detectable difference: none, since one subject or one seed says nothing of how scores spread" in alone


def test_a_folder_that_says_nothing_of_differences_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no experiment\.yaml of a comparison; give a folder"):
        spread_of_differences(tmp_path, grid=True)
    with pytest.raises(UserError, match=r"holds no experiment\.yaml of a comparison; give a folder"):
        reach_of_intervals(tmp_path)
