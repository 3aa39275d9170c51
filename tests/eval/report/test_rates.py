"""Which learning rate each method is compared at."""

from __future__ import annotations

import pytest
from tiny_eval import experiment

from eval.methods import METHODS
from eval.report.rates import choose_learning_rates
from eval.results import read_results
from gsoft_diffusion import UserError


@pytest.fixture
def settings(world):
    return experiment(world, methods=list(METHODS), curve_every=1)


def test_cells_of_an_earlier_version_s_noise_do_not_compare(settings, finished):
    results = read_results(finished)
    first = next(iter(results))
    del results[first]["noise"]
    with pytest.raises(UserError, match="made with other noise than the rest"):
        choose_learning_rates(settings, results)


@pytest.mark.parametrize("best", [1e-3, 1e-2])
def test_the_rate_of_the_best_balance_is_chosen(settings, finished, best):
    def scored(cell, result):
        if cell.method == "base":
            return result | {"scores": {"dino": 0, "clip_t": 1}, "photos": {"dino": 1, "clip_t": 0}}
        share = 0.6 if cell.learning_rate == best else 0.5
        return result | {"scores": {"dino": share, "clip_t": share}}

    results = {cell: scored(cell, result) for cell, result in read_results(finished).items()}
    rates = choose_learning_rates(settings, results)
    assert rates["double_gsoft"] == best
    assert rates["lora"] == 1e-3  # the only one


def test_a_sweep_that_diverged_at_all_rates_is_an_error(settings, finished):
    results = {
        cell: {name: value for name, value in result.items() if name != "scores"}
        if cell.method == "double_gsoft"
        else result
        for cell, result in read_results(finished).items()
    }
    with pytest.raises(UserError, match=r"learning_rates\.double_gsoft: training diverged at all of 0\.001, 0\.01"):
        choose_learning_rates(settings, results)


@pytest.mark.parametrize(
    ("fact", "what"), [("encoders", "encoders"), ("base_model", "base model"), ("photos_hash", "photos of (rex|cup)")]
)
def test_cells_that_do_not_compare_are_named(settings, finished, fact, what):
    results = read_results(finished)
    odd = next(cell for cell in results if cell.method == "boft")
    assert fact in results[odd]
    another = {"name": "base", "fingerprint": "another"} if fact == "base_model" else "another"
    with pytest.raises(UserError, match=rf"results\.jsonl: {odd.id}: made with other {what} than the rest"):
        choose_learning_rates(settings, results | {odd: results[odd] | {fact: another}})


def test_cells_with_other_prompts_do_not_compare(settings, finished):
    results = read_results(finished)
    odd = next(cell for cell in results if cell.method == "boft")
    pictures = [picture | {"prompt": picture["prompt"].replace("sks", "zrt")} for picture in results[odd]["pictures"]]
    with pytest.raises(UserError, match=rf"{odd.id}: made with other prompts for {odd.subject} than the rest"):
        choose_learning_rates(settings, results | {odd: results[odd] | {"pictures": pictures}})
