"""The measurement of how a run's best step is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.choosing import COUNTS, RATES, SUBJECTS, WAYS, averaged, balances, chosen, halves, report
from gsoft_diffusion.scoring.metrics import balance

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "choosing.json"


def record(dino: list[list[float]]) -> dict:
    """Of a subject whose pictures all follow the prompt; `dino` is of the pictures of each step."""
    count = len(dino[0])
    return {
        "subject": "thing",
        "learning_rate": 1e-3,
        "base": {"dino": [0.0] * count, "clip_t": [1.0] * count},
        "photos": {"dino": 1.0, "clip_t": [0.0] * count},
        "steps": {str(step): {"dino": values, "clip_t": [1.0] * count} for step, values in enumerate(dino, 1)},
        "validation_loss": {str(step): loss for step, loss in enumerate((0.3, 0.1, 0.2), 1)},
    }


def test_balances_are_of_the_pictures_asked_for():
    found = balances(record([[0.2, 0.6], [0.8, 0.4], [0.5, 0.5]]), [0])
    assert found == pytest.approx([balance(value, 1.0, (0.0, 1.0), (1.0, 0.0)) for value in (0.2, 0.8, 0.5)])


def test_a_step_is_averaged_with_its_neighbours():
    np.testing.assert_allclose(averaged(np.array([0.0, 3.0, 6.0, 0.0]), 1), [1.5, 3.0, 3.0, 3.0])
    np.testing.assert_allclose(averaged(np.array([0.0, 3.0]), 0), [0.0, 3.0])


def test_each_prompts_seeds_are_halved():
    assert halves(8, 4) == ([0, 1, 4, 5], [2, 3, 6, 7])


def test_pictures_of_the_pool_alone_choose():
    """The first two pictures are best at the second step, all others at the third; which of the two matters not."""
    of_subject = record([[0.1] * 4, [0.9, 0.8, 0.0, 0.0], [0.2, 0.2, 0.9, 0.9]])
    assert set(chosen(of_subject, [0, 1], 1, 0)) == {1}
    assert set(chosen(of_subject, [0, 1, 2, 3], 1, 0)) == {1, 2}


def test_the_report_has_what_each_way_keeps():
    rows = report([record([[0.1] * 8, [0.9] * 4 + [0.5] * 4, [0.2] * 4 + [0.6] * 4])], 8).splitlines()
    assert rows[0] == "Learning rate 0.001:"
    kept = {row.split(" | ")[0].removeprefix("| "): float(row.split(" | ")[1]) for row in rows[4:]}
    judged = [balance(value, 1.0, (0.0, 1.0), (1.0, 0.0)) for value in (0.1, 0.5, 0.6)]
    assert kept["last step"] == kept["the best there is"] == pytest.approx(judged[2], abs=1e-3)
    assert kept["best by 4 pictures, as it is"] == kept["lowest validation loss"] == pytest.approx(judged[1], abs=1e-3)


def test_the_report_of_the_committed_measurements():
    content = json.loads(RESULTS.read_text())
    lines = report(content["records"], content["settings"]["pictures"]).splitlines()
    for rate in RATES:
        heads = lines[lines.index(f"Learning rate {rate:g}:") + 2]
        assert all(name in heads for name in SUBJECTS)
    assert sum(line.startswith("| best by") for line in lines) == len(RATES) * len(WAYS) * len(COUNTS)
