"""Resamples and intervals on numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.report.intervals import (
    Estimate,
    Interval,
    detectable_by,
    detectable_difference,
    estimate,
    half_width_of_more,
    pooled_deviation,
    resampled_weights,
    verdict,
    weighted,
)


def test_weights_are_of_whole_resamples():
    shape = (4, 3, 5)
    weights = resampled_weights(shape, resamples=200)
    assert weights.sum(axis=(1, 2, 3)) == pytest.approx(np.ones(200))
    assert weights.mean(axis=0) == pytest.approx(np.full(shape, 1 / 60), abs=0.006)
    by_subject = weights.sum(axis=(2, 3))
    assert np.allclose(by_subject * 4, np.round(by_subject * 4))  # a subject is drawn a whole number of times
    by_prompt = weights.sum(axis=(1, 2))
    shares = weights[:, :, :, :] / np.where(weights.sum(axis=3, keepdims=True) > 0, weights.sum(3, keepdims=True), 1)
    drawn = weights.sum(axis=3) > 0
    assert np.allclose(shares[drawn], np.broadcast_to(by_prompt[:, None, None, :], weights.shape)[drawn])


def test_averages_are_the_plain_ones_for_equal_weights():
    scores = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 5))
    equal = np.full((1, 4, 2, 5), 1 / 40)
    assert weighted(scores, equal)[0] == pytest.approx(scores.mean(axis=(2, 3, 4)))


def estimated(scores, resamples=400, seed=0):
    draws = weighted(scores, resampled_weights(scores.shape, resamples, seed))
    return estimate(scores.mean(), draws, *scores.shape[:2])


@pytest.mark.parametrize("subjects", [2, 3, 6, 10])
def test_intervals_of_a_mean_hold_the_truth_as_often_as_they_say(subjects):
    """Subjects, seeds and prompts that scatter: 95 % or more, since seeds count twice (`detectable_difference`)."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(300):
        scores = (
            rng.normal(0.3, 0.1, (subjects, 1, 1))
            + rng.normal(0, 0.03, (subjects, 2, 1))
            + rng.normal(0, 0.02, (1, 1, 8))
            + rng.normal(0, 0.05, (subjects, 2, 8))
        )
        interval = estimated(scores, seed=trial).interval
        held += interval.low <= 0.3 <= interval.high
    assert held / 300 >= 0.93


def test_intervals_are_students_where_subjects_alone_scatter():
    scores = np.broadcast_to(np.random.default_rng(2).normal(size=(6, 1, 1)), (6, 2, 2))
    expected = 2.571 * scores[:, 0, 0].std(ddof=1) / math.sqrt(6)
    found = estimated(scores, resamples=20_000)
    assert found.half_width == pytest.approx(expected, rel=0.02)
    assert found.interval.mean - found.interval.low == pytest.approx(found.half_width)


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 1, 4)])
def test_one_subject_or_one_seed_gives_no_interval(shape):
    found = estimated(np.random.default_rng(0).normal(size=shape))
    assert (found.interval.low, found.interval.high, found.half_width) == (None, None, None)
    assert verdict(found) == "no interval"


def test_what_resamples_often_miss_has_no_interval():
    draws = np.where(np.arange(100) < 10, np.nan, 0.5)
    found = estimate(0.5, draws, 4, 3)
    assert (found.interval, found.reached) == (Interval(0.5, None, None), 0.9)
    assert estimate(0.5, np.where(np.arange(100) < 5, np.nan, 0.5), 4, 3).interval.low == 0.5
    assert estimate(math.nan, np.full(100, np.nan), 4, 3).reached == 0


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.01, 0.2, "ahead"), (-0.2, -0.01, "behind"), (-0.1, 0.2, "not decided")]
)
def test_verdicts_follow_from_intervals(low, high, words):
    assert verdict(Estimate(Interval(0.0, low, high), 1.0)) == words


def test_detectable_differences():
    least = detectable_difference(0.1, 10, 3)
    assert detectable_difference(0.2, 10, 3) == pytest.approx(2 * least)
    assert (2.262 + 0.883) * 0.1 / math.sqrt(10) < least < 1.4 * (2.262 + 0.883) * 0.1 / math.sqrt(10)  # Student's test
    assert detectable_difference(0.1, 1, 3) is None
    assert detectable_difference(0.1, 10, 1) is None
    assert pooled_deviation([[0.0, 2.0], [1.0, 1.0]]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no differences"):
        pooled_deviation([])


def test_a_difference_of_the_stated_size_is_found_as_often_as_stated():
    """By the intervals that the report has, of scores whose seeds scatter as much as subjects do."""
    rng = np.random.default_rng(3)
    least, part, found = detectable_difference(0.1, 8, 3), 0.1 / math.sqrt(2), 0
    for trial in range(300):
        scores = least + rng.normal(0, part, (8, 1, 1)) + rng.normal(0, part * math.sqrt(3), (8, 3, 1))
        found += estimated(scores, seed=trial).interval.low > 0
    assert found / 300 == pytest.approx(0.8, abs=0.07)


def test_by_its_intervals_a_comparison_knows_what_it_finds():
    """Of scores that scatter over subjects, seeds and prompts."""
    rng = np.random.default_rng(4)

    def drawn(difference: float) -> np.ndarray:
        parts = [rng.normal(0, 0.1, shape) for shape in ((8, 1, 1), (8, 2, 1), (1, 1, 6), (8, 2, 6))]
        return difference + sum(parts, np.zeros((8, 2, 6)))

    half = float(np.median([estimated(drawn(0), seed=trial).half_width for trial in range(100)]))
    least = detectable_by(half, 8)
    found = sum(estimated(drawn(least), seed=trial).interval.low > 0 for trial in range(300))
    assert found / 300 == pytest.approx(0.8, abs=0.12)
    assert found / 300 > sum(estimated(drawn(half), seed=trial).interval.low > 0 for trial in range(300)) / 300 + 0.15


def test_more_subjects_have_shorter_intervals():
    assert half_width_of_more(0.1, 10, 10) == pytest.approx(0.1)
    students = {10: 2.2622, 20: 2.0930}
    expected = 0.1 * (students[20] / math.sqrt(19)) / (students[10] / math.sqrt(9))
    assert half_width_of_more(0.1, 10, 20) == pytest.approx(expected, rel=1e-4)
