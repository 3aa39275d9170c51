"""From results to lines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_eval import experiment

from eval.cells import Cell
from eval.methods import METHODS
from eval.report.intervals import estimate, resampled_weights, weighted
from eval.report.lines import Line, differences, sweep_lines, table_lines
from eval.report.rates import choose_learning_rates
from eval.results import read_results
from gsoft_diffusion import UserError


@pytest.fixture
def settings(world):
    return experiment(world, methods=list(METHODS), curve_every=1)


def test_a_line_has_the_results_of_all_subjects(settings, finished):
    results = read_results(finished)
    lines = table_lines(settings, results, choose_learning_rates(settings, results))
    assert [line.method for line in lines] == ["photos", "base", *METHODS]
    for line in lines[1:]:
        assert {result["cell"]["subject"] for result in line.results} == {"rex", "cup"}
        assert line.result_of("cup")["cell"]["subject"] == "cup"
        cups = line.scores["dino"]["cup"]
        assert cups == [line.result_of("cup")["scores"]["dino"]]


def test_incomplete_results_make_no_table(settings, finished):
    results = read_results(finished)
    rates = choose_learning_rates(settings, results)
    with pytest.raises(UserError, match=r"results\.jsonl lacks boft--medium\S* and 1 more; run eval.benchmark again"):
        table_lines(settings, {cell: result for cell, result in results.items() if cell.method != "boft"}, rates)


@pytest.mark.parametrize("gone", ["base--cup--seed0", "double_gsoft--medium--lr0.01--cup--seed0"])
def test_incomplete_results_choose_no_rates(settings, finished, gone):
    results = {cell: result for cell, result in read_results(finished).items() if cell.id != gone}
    with pytest.raises(UserError, match=f"lacks {gone}; run"):
        choose_learning_rates(settings, results)
    with pytest.raises(UserError, match=r"lacks base--\S* and \d+ more; run"):
        choose_learning_rates(settings, {})


def test_a_rate_with_one_divergence_has_no_scores(settings, finished):
    results = read_results(finished)
    spoilt = next(cell for cell in results if (cell.method, cell.learning_rate) == ("double_gsoft", 1e-2))
    facts = {name: value for name, value in results[spoilt].items() if name not in ("scores", "pictures")}
    lines = sweep_lines(settings, results | {spoilt: facts | {"diverged": "not finite"}})["double_gsoft"]
    assert lines[1e-2].interval("dino") is None
    assert lines[1e-3].interval("dino") is not None


@pytest.mark.parametrize(
    ("cell", "facts", "title", "label"),
    [
        (Cell("base", None, None, "rex", 0), {}, "Base model", "Base model"),
        (Cell("lora", "small", 2e-3, "rex", 0), {}, "LoRA small", "LoRA small, 0.002"),
        (Cell("lora", "small", 2e-3, "rex", 0), {"stopped_at": 60}, "LoRA small", "LoRA small, 0.002, step 60"),
        (Cell("full", None, 1e-4, "rex", 0), {}, "Full fine-tuning", "Full fine-tuning, 0.0001"),
    ],
)
def test_lines_are_named(cell, facts, title, label):
    line = Line(*cell.row, [{"cell": vars(cell), **facts}], {})
    assert (line.title, line.label_of("rex")) == (title, label)


def by_hand(method, scores):
    """A line with these balances, by subject one a seed."""
    by_subject = {f"s{number}": list(seeds) for number, seeds in enumerate(scores)}
    return Line(method, "medium", 1e-3, [], {"dino": {}, "clip_i": {}, "clip_t": {}, "balance": by_subject})


def test_a_score_has_the_interval_of_its_subjects_and_seeds():
    scores = np.random.default_rng(0).normal(size=(4, 3, 1))
    draws = weighted(scores, resampled_weights(scores.shape))
    assert by_hand("lora", scores[..., 0]).interval("balance") == estimate(scores.mean(), draws, 4, 3).interval
    assert by_hand("lora", scores[..., 0]).interval("dino") is None


def test_a_paired_difference_is_surer_than_the_methods_themselves():
    theirs = [[subject / 10] * 2 for subject in range(10)]
    ours, other = by_hand("double_gsoft", np.array(theirs) + 0.05), by_hand("lora", theirs)
    ((budget, name, intervals),) = differences([ours, other])
    assert (budget, name, list(intervals)) == ("medium", "LoRA", ["balance"])
    assert (intervals["balance"].low, intervals["balance"].high) == pytest.approx((0.05, 0.05))
    assert ours.interval("balance").low < other.interval("balance").high  # alone they overlap


def test_what_is_resampled_otherwise_has_other_intervals():
    line = by_hand("lora", [[0.1, 0.2], [0.3, 0.5]])
    wide = replace(line, resampled={"balance": np.array([0.0, 1.0] * 50)})
    assert wide.interval("balance").mean == line.interval("balance").mean
    assert wide.interval("balance").high > line.interval("balance").high + 1
