"""Settings that other subjects chose, and how sure their scores are."""

from __future__ import annotations

import numpy as np
import pytest

from eval.report.held_out import NO_CHOICE, choices, chosen_means
from eval.report.intervals import estimate, resampled_weights, verdict

BALANCES = np.array([[0.9, 0.1, 0.2], [0.3, 0.4, 0.3], [0.3, 0.3, 0.9]])[:, :, None]
ONCE = np.ones((1, 3, 1))


def test_a_setting_is_chosen_without_the_subject_that_is_reported():
    assert choices(BALANCES, [0, 1, 2], ONCE).tolist() == [[2, 2, 0]]  # on all three, the last setting would be best
    assert choices(BALANCES, [None, 2], ONCE).tolist() == [[2, 0]]


def test_a_setting_that_diverged_on_another_subject_is_not_chosen():
    diverged = np.concatenate([BALANCES, np.array([[[1.0], [np.nan], [1.0]]])])
    assert choices(diverged, [0, 1, 2], ONCE).tolist() == [[2, 3, 0]]  # for the second, its own is not known
    assert choices(np.full((2, 3, 1), np.nan), [0, 1, 2], ONCE).tolist() == [[NO_CHOICE] * 3]
    without_it = np.array([[[1.0], [0.0], [1.0]]])
    assert choices(diverged, [0, 1, 2], without_it).tolist() == [[3, 3, 3]]  # nor in a resample that lacks the second


def test_copies_of_a_subject_leave_the_choice_together():
    twice = np.array([[[2.0], [1.0], [0.0]], [[3.0], [0.0], [0.0]]])
    chosen = choices(BALANCES, [0, 1, 2], twice)
    assert chosen[0, :2].tolist() == [1, 0]  # by the second alone; by the first alone
    assert chosen[1, 0] == NO_CHOICE


def test_each_resample_scores_its_subjects_at_its_own_choices():
    scores = np.array([[[0.1, 0.3], [0.5, 0.5]], [[1.0, 1.0], [np.nan, 2.0]]])  # (settings, subjects, seeds)
    weights = np.array([[[1, 1], [1, 1]], [[0, 2], [0, 2]], [[2, 2], [0, 0]], [[0, 0], [0, 0]]]) / 4
    chosen = np.array([[0, 0], [1, 1], [0, NO_CHOICE], [0, 0]])
    found = chosen_means(scores, chosen, weights)
    assert found[:3] == pytest.approx([0.35, 1.5, 0.2])  # the second has another seed than the one that diverged
    assert np.isnan(found[3])
    assert np.isnan(chosen_means(scores, np.array([[0, 1], [0, NO_CHOICE]]), weights[[0, 0]])).all()


@pytest.mark.parametrize("settings", [1, 15])
def test_a_difference_of_equal_methods_is_hardly_ever_called_one(settings):
    """Two methods of equal settings, so that chance chooses; ten subjects and two seeds.

    With the choice taken as given, one of four such differences among fifteen settings each would be called one.
    """
    rng = np.random.default_rng(0)
    decided = as_given = 0
    for trial in range(150):
        weights = resampled_weights((10, 2, 1), 300, trial)[..., 0]
        values, draws, given = [], [], []
        for _ in range(2):
            scores = rng.normal(0, 0.08, (settings, 10, 1)) + rng.normal(0, 0.05, (settings, 10, 2))
            once = choices(scores, range(10), np.ones((1, 10, 2)))
            values.append(chosen_means(scores, once, np.ones((1, 10, 2)))[0])
            draws.append(chosen_means(scores, choices(scores, range(10), weights), weights))
            given.append(chosen_means(scores, np.repeat(once, 300, axis=0), weights))
        found = [estimate(values[0] - values[1], each[0] - each[1], 10, 2) for each in (draws, given)]
        decided += verdict(found[0]) != "not decided"
        as_given += verdict(found[1]) != "not decided"
    assert decided <= 0.05 * 150 + 5
    if settings > 1:
        assert as_given > 0.15 * 150
