from __future__ import annotations

import json

import numpy as np
import pytest

from examples.language import report
from examples.language.report import Drawn, chosen_rates, costs, difference_table, draw, mean, write_report
from gsoft_diffusion.foundation.errors import UserError

TRUTH = "0 1 0 1 1 0 1 0 0 1"


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(report, "DRAWS", 200)


def training(method: str, rate: float, validation: float | None, answers: str = TRUTH, seed: int = 0, **more) -> dict:
    record = {"kind": "training", "task": "sentiment", "method": method, "learning_rate": rate, "seed": seed}
    return record | {"validation": validation, "answers": answers, "learned": 1000, "published": None} | more


def test_rates_are_chosen_by_the_validation_parts_of_the_sweep_at_seed_0():
    records = [
        training("lora", 0.1, 70.0, test=99.0),
        training("lora", 0.2, 80.0, test=1.0),
        training("lora", 0.1, 60.0, task="rating"),
        training("lora", 0.2, 60.0, task="rating"),
        training("lora", 0.1, 100.0, task="topic"),
        training("lora", 0.1, 100.0, seed=1),
        training("oft", 0.4, 50.0),
        training("oft", 0.2, 50.0),
        training("oft", 0.8, None),
        training("boft", 0.1, None),
    ]
    assert chosen_rates(records, ["sentiment", "rating"]) == {"lora": 0.2, "oft": 0.2}


def test_a_score_is_the_mean_over_seeds_and_spreads_with_texts_and_seeds():
    truth = np.array([0.0, 1.0] * 50)
    right, half = truth, np.zeros(100)
    one = draw("sentiment", np.stack([half, half]), truth)
    both = draw("sentiment", np.stack([right, half]), truth)
    assert (one.value, both.value) == (50, 75)
    assert both.draws.std() > 2 * one.draws.std()  # seeds that differ
    assert one.draws.mean() == pytest.approx(50, abs=2)
    assert one.draws.std() == pytest.approx(5, rel=0.3)  # of a share of a half among a hundred


def test_two_methods_are_compared_on_the_same_draws():
    truth = np.array([0.0, 1.0] * 50)
    ours, theirs = truth.copy(), truth.copy()
    theirs[:10] = 1 - theirs[:10]
    scores = {
        ("sentiment", "gsoft"): draw("sentiment", ours[None], truth),
        ("sentiment", "lora"): draw("sentiment", theirs[None], truth),
        ("sentiment", "oft"): draw("sentiment", theirs[None], truth),
    }
    difference = scores["sentiment", "lora"].draws - scores["sentiment", "oft"].draws
    assert not difference.any()
    rows = difference_table(scores, ["sentiment"], ["gsoft", "lora", "oft"])
    assert "| LoRA, r 4 | 10.0 [" in rows
    assert "GSOFT, b 8" not in rows


def test_the_mean_over_tasks_is_draw_by_draw():
    both = mean([Drawn(10.0, np.array([1.0, 2.0])), Drawn(30.0, np.array([3.0, 6.0]))])
    assert both.value == 20
    assert both.draws.tolist() == [2, 4]


def test_costs_are_medians_and_ratios_within_a_repetition():
    def step(method: str, repetition: int, seconds: list[float]) -> dict:
        return {
            "kind": "step",
            "method": method,
            "repetition": repetition,
            "seconds": seconds,
            "kept_bytes": 3 * 2**20,
        }

    records = [
        *(step("lora", number, [one, 9.0]) for number, one in enumerate((1.0, 2.0, 4.0))),
        *(step("gsoft", number, [9.0, one]) for number, one in enumerate((2.0, 3.0, 4.4))),
    ]
    assert costs(records, "gsoft") == ["3.00", "1.50", "3"]
    assert costs(records, "oft") == ["", "", ""]


@pytest.mark.parametrize("lost", ["a method's seed", "a task of the sweep", "answers", "all"])
def test_no_report_of_a_comparison_that_is_not_whole(tmp_path, lost):
    records = [
        {"kind": "truth", "task": "sentiment", "labels": TRUTH},
        *(training(method, rate, 70.0) for method in ("lora", "gsoft") for rate in (0.1, 0.2)),
        *(training(method, 0.1, 70.0, seed=1) for method in ("lora", "gsoft")),
    ]
    sweep_tasks = ["sentiment"]
    if lost == "a method's seed":
        records.pop()
    elif lost == "a task of the sweep":
        sweep_tasks.append("rating")
    elif lost == "answers":
        del records[-1]["answers"]
    else:
        records = []
    content = {"settings": {"sweep_tasks": sweep_tasks}, "machine": {}, "records": records}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"results\.json: is not of a whole comparison"):
        write_report(tmp_path)


def test_the_report_of_a_small_comparison(tmp_path):
    wrong = TRUTH.replace("0", "1", 2)
    records = [
        {"kind": "truth", "task": "sentiment", "labels": TRUTH},
        training("lora", 0.1, 70.0, wrong),
        training("lora", 0.2, 60.0),
        training("lora", 0.1, 70.0, TRUTH, seed=1),
        training("gsoft", 0.1, 70.0, learned=900, published=1800),
        training("gsoft", 0.2, None),
        training("gsoft", 0.1, 0.0, seed=1),
    ]
    settings = {"max_steps": 4, "sweep_tasks": ["sentiment"]}
    content = {"settings": settings, "machine": {"versions": {"torch": "2"}}, "records": records}
    (tmp_path / "results.json").write_text(json.dumps(content))
    written = write_report(tmp_path)
    assert [path.name for path in written] == ["table.md", "scores.svg"]
    text = written[0].read_text()
    assert "- max_steps: 4\n- sweep_tasks: sentiment\n- versions: torch 2\n" in text
    assert "| LoRA, r 4 | 1,000 |  | 90.0 [" in text
    assert "| GSOFT, b 8, m 2 | 900 | 1,800 | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] |" in text
    assert "| LoRA, r 4 | **0.1** | 70.0 |" in text
    assert "| GSOFT, b 8, m 2 | 0.2 | diverged |" in text
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_report(tmp_path)] == before


@pytest.mark.parametrize("content", [None, "{", '{"settings": {}}'])
def test_a_folder_without_results_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json: is not of examples\.language\.compare"):
        write_report(tmp_path)
