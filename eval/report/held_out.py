"""Scores at settings that other subjects chose, and how sure these are. Pure functions.

**Choice.** Each subject is scored at the setting whose mean balance is best on all *other* subjects, so that nothing of
its own chose it. That is cross-validation with one left out.

**Resamples choose anew.** Where settings are nearly equal, leaving a subject out turns the choice towards a setting
that is worse for it. The mean of such scores therefore scatters by more than the scores at the settings that happened
to be chosen. So the choice is a part of what a resample (`eval/report/intervals.py`) computes: each of its subjects is
scored at the setting that is best on its other subjects, and copies of a subject leave the choice together. In
simulations these intervals are rather too long than too short (`tests/eval/report/test_held_out.py`). Of two or three
subjects, too many resamples hold one subject only, so there is no interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.report.intervals import Array

NO_CHOICE = -1


def choices(balances: Array, own: Sequence[int | None], weights: Array) -> NDArray[np.intp]:
    """For each resample and each reported subject, the setting that is best on all others: `(resamples, S)`.

    balances: `(N, C, K)`, of each setting on each seed of the subjects that choose. NaN where a training diverged,
    which rules the setting out for the other subjects. own: for each of the S reported subjects its place among those
    that choose; None if it is not among them. weights: `(resamples, C, K)`, how much each balance counts. `NO_CHOICE`
    where every setting diverged on other subjects, or a resample has no other subject.
    """
    drawn = weights[:, None] > 0  # (resamples, 1, C, K)
    parts = np.where(drawn, weights[:, None] * balances, 0.0).sum(axis=3)  # (resamples, N, C)
    diverged = np.isnan(parts)
    parts = np.where(diverged, 0.0, parts)
    counts = weights.sum(axis=2)  # (resamples, C)
    rows = np.arange(len(weights))
    chosen = np.empty((len(weights), len(own)), dtype=np.intp)
    for subject, place in enumerate(own):
        others = [number for number in range(counts.shape[1]) if number != place]
        means = np.where(diverged[:, :, others].any(axis=2), -np.inf, parts[:, :, others].sum(axis=2))
        best = means.argmax(axis=1)
        possible = (counts[:, others].sum(axis=1) > 0) & np.isfinite(means[rows, best])
        chosen[:, subject] = np.where(possible, best, NO_CHOICE)
    return chosen


def chosen_means(scores: Array, chosen: NDArray[np.intp], weights: Array) -> Array:
    """The mean of a score in each resample, each subject at its setting there: `(resamples,)`.

    scores: `(N, S, K)`, of each setting, subject and seed; NaN where a training diverged. chosen: `(resamples, S)`, as
    `choices` gives it. weights: `(resamples, S, K)`; a resample's need not sum to 1. NaN where a subject that was drawn
    has no choice, or diverged at it.
    """
    at_choice = scores[np.maximum(chosen, 0), np.arange(scores.shape[1])]  # (resamples, S, K)
    at_choice = np.where((chosen == NO_CHOICE)[:, :, None], np.nan, at_choice)
    sums = np.where(weights > 0, weights * at_choice, 0.0).sum(axis=(1, 2))
    totals = weights.sum(axis=(1, 2))
    return np.divide(sums, totals, out=np.full(len(sums), np.nan), where=totals > 0)
