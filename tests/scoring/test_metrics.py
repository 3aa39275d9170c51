"""Every metric against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from gsoft_diffusion.scoring import metrics

RIGHT, UP, LEFT = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
DIAGONAL = [1.0, 1.0]  # 45° from RIGHT and UP: cosine √½
HALF = math.sqrt(0.5)


def test_cosines_ignore_length():
    assert torch.allclose(
        metrics.cosines(tensor([[3.0, 0.0], [0.0, 0.5]]), tensor([RIGHT, DIAGONAL, LEFT])),
        tensor([[1, HALF, -1], [0, HALF, 0]], dtype=torch.float64),
    )


def test_clip_i_and_dino_average_over_all_photos():
    scores = metrics.clip_i(tensor([RIGHT, DIAGONAL]), tensor([RIGHT, UP]))
    assert scores.tolist() == pytest.approx([0.5, HALF])
    assert metrics.dino is metrics.clip_i


def test_clip_t_compares_each_picture_with_its_own_prompt_only():
    scores = metrics.clip_t(tensor([RIGHT, RIGHT, UP]), tensor([RIGHT, UP, DIAGONAL]))
    assert scores.tolist() == pytest.approx([1, 0, HALF])


def test_clip_t_refuses_pictures_without_prompts():
    with pytest.raises(ValueError, match="2 pictures, 1 prompts"):
        metrics.clip_t(tensor([RIGHT, UP]), tensor([RIGHT]))


def test_nearest_photo_is_the_largest_similarity():
    assert metrics.nearest_photo(tensor([DIAGONAL, LEFT]), tensor([RIGHT, UP])).tolist() == pytest.approx([HALF, 0])


def test_preservation_is_high_when_the_class_has_become_the_subject():
    photos = tensor([RIGHT])
    assert metrics.preservation(tensor([RIGHT]), photos).item() == pytest.approx(1)
    assert metrics.preservation(tensor([UP]), photos).item() == pytest.approx(0)


def test_diversity_is_the_mean_distance_over_pairs():
    # pairs: RIGHT-UP 1 − 0, RIGHT-LEFT 1 − (−1), UP-LEFT 1 − 0
    assert metrics.diversity(tensor([RIGHT, UP, LEFT])) == pytest.approx(4 / 3)
    assert metrics.diversity(tensor([UP, UP])) == pytest.approx(0)
    with pytest.raises(ValueError, match="two"):
        metrics.diversity(tensor([UP]))


def test_drift_compares_the_same_prompt_and_seed():
    assert metrics.drift(tensor([RIGHT, UP]), tensor([RIGHT, LEFT])).tolist() == pytest.approx([0, 1])


def test_ceiling_leaves_a_photo_out_of_its_own_score():
    assert metrics.real_photo_ceiling(tensor([RIGHT, UP, LEFT])) == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("fidelity", "prompt", "expected"),
    [
        (0.4, 0.3, 0.0),  # the base model: no subject
        (0.8, 0.1, 0.0),  # copies of the photos: no prompt
        (0.6, 0.2, 0.5),  # half way on both
        (0.8, 0.3, 1.0),
        (0.9, 0.35, 1.0),  # nothing is gained beyond the ends
        (0.8, 0.2, 2 / 3),  # harmonic mean of 1 and ½
    ],
)
def test_balance(fidelity, prompt, expected):
    assert metrics.balance(fidelity, prompt, base=(0.4, 0.3), photos=(0.8, 0.1)) == pytest.approx(expected)


def test_balance_without_room_between_the_ends_is_zero():
    assert metrics.balance(0.9, 0.2, base=(0.8, 0.1), photos=(0.8, 0.1)) == 0


def test_there_is_no_mean_of_nothing():
    with pytest.raises(ValueError, match="no values"):
        metrics.mean([])
