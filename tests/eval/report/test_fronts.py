"""Fronts, areas and intervals on numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.report import fronts
from eval.report.fronts import (
    area,
    detectable_difference,
    estimate,
    front,
    held_out,
    lead,
    leads,
    measured,
    measures,
    pooled_deviation,
    prompt_at,
    resampled_weights,
    subject_at,
    verdict,
    weighted,
)
from gsoft_diffusion.scoring.metrics import Interval

BASE, PHOTOS = (0.0, 1.0), (1.0, 0.0)
POINTS = np.array([[0.5, 0.6], [0.2, 0.9], [0.4, 0.5], [0.8, 0.3], [0.5, 0.6], [0.1, 0.9]])


def test_a_front_leaves_out_what_is_beaten():
    assert front(POINTS).tolist() == [[0.2, 0.9], [0.5, 0.6], [0.8, 0.3]]
    assert front(np.array([[0.5, 0.5], [0.5, 0.7], [np.nan, np.nan]])).tolist() == [[0.5, 0.7]]
    assert front(np.full((2, 2), np.nan)).shape == (0, 2)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (POINTS, 0.2 * 0.9 + 0.6 * 0.6),  # level to 0.2, a line from 0.9 to 0.3 to 0.8, nothing after
        ([[0.5, 0.6]], 0.3),
        ([[1.2, 1.3]], 1.0),  # cut at the ends
        ([[-0.1, 0.9]], 0.0),
        ([[0.5, -0.2]], 0.0),
        ([[0.0, 1.0], [1.0, 0.0]], 0.5),
        ([[0.0, 1.5], [1.0, -0.5]], 0.25 + 0.5 * 0.5),  # above 1 until 0.25, below 0 after 0.75
        (np.full((1, 2), np.nan), 0.0),
    ],
)
def test_areas_by_hand(points, expected):
    assert area(front(np.array(points, dtype=float)), BASE, PHOTOS) == pytest.approx(expected)


def test_an_area_does_not_depend_on_the_scale_of_scores():
    scaled = POINTS * [0.4, 0.2] + [0.1, -0.3]
    assert area(front(scaled), (0.1, -0.1), (0.5, -0.3)) == pytest.approx(area(front(POINTS), BASE, PHOTOS))


def test_ends_in_the_wrong_order_have_no_area():
    assert math.isnan(area(front(POINTS), (0.5, 1.0), (0.5, 0.0)))
    assert math.isnan(area(front(POINTS), (0.0, 0.2), (1.0, 0.2)))


def test_levels_are_read_between_points_and_never_beyond():
    assert prompt_at(front(POINTS), 0.35) == pytest.approx(0.75)
    assert prompt_at(front(POINTS), 0.8) == pytest.approx(0.3)
    assert math.isnan(prompt_at(front(POINTS), 0.81))
    assert math.isnan(prompt_at(front(POINTS), 0.19))
    assert subject_at(front(POINTS), 0.45) == pytest.approx(0.65)
    assert math.isnan(subject_at(front(POINTS), 0.95))
    assert math.isnan(subject_at(front(POINTS), 0.2))


def test_all_measures_of_a_front():
    found = measures(POINTS, BASE, PHOTOS)
    nan = math.nan
    # area, with the base model's point (0, 1); prompt at 0.25, 0.5, 0.75; subject at the same
    expected = [0.2 * 0.95 + 0.6 * 0.6, 0.85, 0.6, 0.35, nan, 0.6, 0.35]
    assert found == pytest.approx(expected, nan_ok=True)
    ends = np.array([[BASE, PHOTOS]] * 2)
    each = measured(np.stack([POINTS, POINTS + np.array([0.1, 0])]), ends)
    assert each[0] == pytest.approx(expected, nan_ok=True)
    assert each[1, 0] == pytest.approx(0.3 * 0.95 + 0.6 * 0.6)


def test_a_lead_is_taken_where_both_fronts_reach():
    ours, others = np.array([[0.2, 0.9], [0.8, 0.5]]), np.array([[0.2, 0.7], [0.6, 0.3]])
    to_six_tenths = 0.2 * 0.95 + 0.4 * (0.9 + 0.9 - 0.4 * 2 / 3) / 2
    expected = (to_six_tenths - (0.2 * 0.85 + 0.4 * 0.5)) / 0.6
    assert lead(ours, others, BASE, PHOTOS) == pytest.approx(expected)
    assert lead(others, ours, BASE, PHOTOS) == pytest.approx(-expected)
    farther = np.vstack([ours, [1.5, 0.4]])
    assert lead(farther, others, BASE, PHOTOS) == pytest.approx(expected)  # reach alone gives no lead
    scaled = [each * [0.4, 0.2] + [0.1, -0.3] for each in (ours, others)]
    assert lead(*scaled, (0.1, -0.1), (0.5, -0.3)) == pytest.approx(expected)
    assert lead(ours, ours, BASE, PHOTOS) == 0
    above = np.array([[0.1, 1.1]])  # more of both than the base model
    assert lead(above, np.array([[0.1, 0.9]]), BASE, PHOTOS) == pytest.approx(1.1 - 0.95)
    assert math.isnan(lead(ours, np.full((2, 2), np.nan), BASE, PHOTOS))
    assert math.isnan(lead(ours, others, PHOTOS, BASE))
    drawn = leads(np.stack([ours, others]), np.stack([others, ours]), np.array([[BASE, PHOTOS]] * 2))
    assert drawn.tolist() == pytest.approx([expected, -expected])


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


def interval_of_mean(scores, resamples=400, seed=0):
    draws = weighted(scores, resampled_weights(scores.shape, resamples, seed))
    return estimate(scores.mean(), draws, *scores.shape[:2])


def test_intervals_of_a_mean_hold_the_truth_as_often_as_they_say():
    """Subjects, seeds and prompts that scatter: of 300 intervals at 95 % about 285 hold the true mean."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(300):
        scores = (
            rng.normal(0.3, 0.1, (6, 1, 1))
            + rng.normal(0, 0.05, (6, 3, 1))
            + rng.normal(0, 0.05, (1, 1, 4))
            + rng.normal(0, 0.1, (6, 3, 4))
        )
        interval = interval_of_mean(scores, seed=trial).interval
        held += interval.low <= 0.3 <= interval.high
    assert 0.93 <= held / 300 <= 0.995


def test_intervals_are_as_long_as_students():
    """Of a mean over subjects that alone scatter, and not shorter by a third as plain percentiles are."""
    rng = np.random.default_rng(2)
    scores = np.broadcast_to(rng.normal(size=(6, 1, 1)), (6, 2, 2))
    expected = 2.571 * scores[:, 0, 0].std(ddof=1) / math.sqrt(6)
    assert interval_of_mean(scores, resamples=20_000).half_width == pytest.approx(expected, rel=0.15)


def test_scores_by_subject_have_the_same_intervals():
    scores = np.random.default_rng(0).normal(size=(4, 3, 1))
    by_subject = {str(number): column[:, 0].tolist() for number, column in enumerate(scores)}
    assert fronts.bootstrap(by_subject) == interval_of_mean(scores, resamples=fronts.RESAMPLES).interval


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 1, 4)])
def test_one_subject_or_one_seed_gives_no_interval(shape):
    found = interval_of_mean(np.random.default_rng(0).normal(size=shape))
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
    assert verdict(fronts.Estimate(Interval(0.0, low, high), 1.0)) == words


def test_a_setting_is_chosen_without_the_subject_that_is_reported():
    balances = np.array([[0.9, 0.1, 0.2], [0.3, 0.4, 0.3], [0.3, 0.3, 0.9]])
    assert held_out(balances, [0, 1, 2]) == [2, 2, 0]  # on all three subjects, the last setting would be best
    assert held_out(balances, [None, 2]) == [2, 0]
    diverged = np.vstack([balances, [1.0, np.nan, 1.0]])
    assert held_out(diverged, [0, 1, 2]) == [2, 2, 0]
    with pytest.raises(ValueError, match="every setting diverged"):
        held_out(np.full((2, 3), np.nan), [0, 1, 2])
    with pytest.raises(ValueError, match="one only"):
        held_out(balances[:, :1], [0])


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
        found += interval_of_mean(scores, seed=trial).interval.low > 0
    assert found / 300 == pytest.approx(0.8, abs=0.07)
