"""Fronts, areas and intervals on numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.report.fronts import (
    area,
    front,
    lead,
    lead_range,
    leads,
    measured,
    measures,
    prompt_at,
    subject_at,
)
from eval.report.intervals import estimate, resampled_weights, verdict, weighted

BASE, PHOTOS = (0.0, 1.0), (1.0, 0.0)
POINTS = np.array([[0.5, 0.7], [0.2, 0.9], [0.4, 0.6], [0.8, 0.3], [0.5, 0.7], [0.1, 0.9], [0.6, 0.5]])


def test_a_front_leaves_out_what_is_beaten_by_a_point_or_by_two_of_them():
    assert front(POINTS).tolist() == [[0.2, 0.9], [0.5, 0.7], [0.8, 0.3]]
    assert front(np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert front(np.array([[0.5, 0.5], [0.5, 0.7], [np.nan, np.nan]])).tolist() == [[0.5, 0.7]]
    assert front(np.full((2, 2), np.nan)).shape == (0, 2)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (POINTS, 0.2 * 0.9 + 0.3 * 0.8 + 0.3 * 0.5),  # level to 0.2, lines to 0.5 and 0.8, nothing after
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
    assert prompt_at(front(POINTS), 0.35) == pytest.approx(0.8)
    assert prompt_at(front(POINTS), 0.8) == pytest.approx(0.3)
    assert math.isnan(prompt_at(front(POINTS), 0.81))
    assert math.isnan(prompt_at(front(POINTS), 0.19))
    assert subject_at(front(POINTS), 0.5) == pytest.approx(0.65)
    assert math.isnan(subject_at(front(POINTS), 0.95))
    assert math.isnan(subject_at(front(POINTS), 0.2))


def test_all_measures_of_a_front():
    found = measures(POINTS, BASE, PHOTOS)
    nan = math.nan
    # area, with the base model's point (0, 1); prompt at 0.25, 0.5, 0.75; subject at the same
    expected = [0.2 * 0.95 + 0.3 * 0.8 + 0.3 * 0.5, 0.9 - 0.2 / 6, 0.7, 0.3 + 0.2 / 3, nan, 0.65, 0.425]
    assert found == pytest.approx(expected, nan_ok=True)
    ends = np.array([[BASE, PHOTOS]] * 2)
    each = measured(np.stack([POINTS, POINTS + np.array([0.1, 0])]), ends)
    assert each[0] == pytest.approx(expected, nan_ok=True)
    assert each[1, 0] == pytest.approx(0.3 * 0.95 + 0.3 * 0.8 + 0.3 * 0.5)


def test_a_lead_is_taken_where_both_fronts_reach():
    ours, others = np.array([[0.2, 0.9], [0.8, 0.5]]), np.array([[0.2, 0.7], [0.6, 0.3]])
    to_six_tenths = 0.2 * 0.95 + 0.4 * (0.9 + 0.9 - 0.4 * 2 / 3) / 2
    expected = (to_six_tenths - 0.6 * (1.0 + 0.3) / 2) / 0.6  # the other's first point is below its front
    assert lead(ours, others, BASE, PHOTOS) == pytest.approx(expected)
    assert lead(others, ours, BASE, PHOTOS) == pytest.approx(-expected)
    farther = np.vstack([ours, [1.5, -0.5]])
    assert lead(farther, others, BASE, PHOTOS) == pytest.approx(expected)  # reach alone gives no lead
    assert lead(farther, ours, BASE, PHOTOS) == pytest.approx(0)
    assert lead_range(farther, others, BASE, PHOTOS) == pytest.approx(0.6)
    assert lead_range(farther, farther, BASE, PHOTOS) == 1
    scaled = [each * [0.4, 0.2] + [0.1, -0.3] for each in (ours, others)]
    assert lead(*scaled, (0.1, -0.1), (0.5, -0.3)) == pytest.approx(expected)
    assert lead(ours, ours, BASE, PHOTOS) == 0
    above = np.array([[0.1, 1.1]])  # more of both than the base model
    assert lead(above, np.array([[0.1, 0.9]]), BASE, PHOTOS) == pytest.approx(1.1 - 0.95)
    assert math.isnan(lead(ours, np.full((2, 2), np.nan), BASE, PHOTOS))
    assert math.isnan(lead(ours, others, PHOTOS, BASE))
    drawn = leads(np.stack([ours, others]), np.stack([others, ours]), np.array([[BASE, PHOTOS]] * 2))
    assert drawn.tolist() == pytest.approx([expected, -expected])


def test_more_settings_never_lower_a_front():
    """A setting between others, but below the line between them, counts for nothing: both others are still there."""
    few, more = np.array([[0.8, 0.6]]), np.array([[0.4, 0.65], [0.8, 0.6]])
    assert lead(few, more, BASE, PHOTOS) == 0
    assert measures(few, BASE, PHOTOS) == pytest.approx(measures(more, BASE, PHOTOS), nan_ok=True)


@pytest.mark.parametrize("crowded", ["low", "in three places"])
def test_a_lead_of_equal_methods_is_hardly_ever_called_one(crowded):
    """Two methods on one true front, whose settings lie at other places of it; ten subjects, two seeds, eight prompts.

    What noise and places leave in the mean lead is less than a quarter of what such a comparison can detect.
    """
    rng = np.random.default_rng(0)
    even = np.linspace(0.05, 0.9, 15)
    places = {"low": np.linspace(0.02, 0.94, 15) ** 2, "in three places": np.repeat([0.2, 0.5, 0.9], 5)}[crowded]
    shape, found = (10, 2, 8), []
    base, photos = np.zeros((2, *shape)), np.zeros((2, *shape))
    base[1], photos[0] = 1.0, 1.0
    ends = np.stack([base, photos])
    for trial in range(60):
        scatter = rng.normal(0, 0.08, (2, 10, 1, 1))  # a subject is as hard for both
        both = []
        for subject in (even, places):
            truth = np.stack([subject, 1 - subject**2], axis=1)[:, :, None, None, None]
            of_seed, of_picture = rng.normal(0, 0.05, (15, 2, 10, 2, 1)), rng.normal(0, 0.1, (15, 2, *shape))
            both.append(truth + scatter + of_seed + of_picture)
        weights = resampled_weights(shape, 100, trial)
        drawn = leads(*(weighted(each, weights) for each in both), weighted(ends, weights))
        value = lead(*(each.mean(axis=(2, 3, 4)) for each in both), BASE, PHOTOS)
        found.append(estimate(value, drawn, 10, 2))
    assert sum(verdict(each) != "not decided" for each in found) <= 3
    assert abs(np.mean([each.interval.mean for each in found])) < 0.0085
