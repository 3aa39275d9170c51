"""How sure a mean, or anything that is read from fronts, is. Pure functions.

Scores are an array `(S, K, P)`: a subject, a seed and a prompt each.

**Resamples.** A hierarchical bootstrap: of a resample, `S` subjects are drawn with replacement, for each of them `K` of
its seeds, and `P` prompts, the same for all subjects, since a prompt that is hard is hard for all. (Of DreamBooth's two
lists, those at one place are drawn together. Unrelated ones scatter as much that way.) Everything is computed anew from
the resample. All methods have the same draws, so their differences are paired.

**Intervals.** The bounds are `value ± t·√(S/(S−1))·sd`, with `sd` the standard deviation over the resamples and `t`
Student's quantile at `S − 1` degrees of freedom (Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, ch. 12).
The root undoes that a resample's variance is divided by `S` where Student's is by `S − 1`. Of a mean of `S` subjects
that alone scatter these are Student's bounds. Percentiles of the resamples would never leave the range of the data, and
so be too short for few subjects. One subject or one seed says nothing of the spread over subjects or seeds, so it gives
no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Array = NDArray[np.float64]

LEVEL = 0.95  # of intervals
POWER = 0.8
RESAMPLES = 2000
SIMULATED = 20_000  # comparisons, to see which difference they find
SURE = 0.95  # share of the resamples that must have a value, or there is no interval of it


@dataclass(frozen=True)
class Interval:
    """What was found, and its bounds; None where nothing says how it scatters."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Estimate:
    """What was found, and in which share of the resamples it could be found at all.

    interval: mean NaN where the front does not reach; no bounds of one subject or seed, or where `reached` is under
    `SURE`. reached: 1 if all resamples have a value.
    """

    interval: Interval
    reached: float

    @property
    def half_width(self) -> float | None:
        """Half the interval's length; None without one."""
        low, high = self.interval.low, self.interval.high
        return None if low is None or high is None else (high - low) / 2


def resampled_weights(shape: tuple[int, int, int], resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """How much each score counts in a resample, `(resamples, S, K, P)`; each resample's weights sum to 1.

    shape: `(S, K, P)`, how many subjects, seeds and prompts. resamples: how many are drawn. seed: of the drawing.
    """
    subjects, seeds, prompts = shape
    rng = np.random.default_rng(seed)
    weights = np.zeros((resamples, *shape))
    by_prompt = rng.multinomial(prompts, [1 / prompts] * prompts, size=resamples) / prompts  # (resamples, P)
    drawn = rng.integers(subjects, size=(resamples, subjects))
    for place in range(subjects):  # a subject that is drawn twice has its seeds drawn twice
        by_seed = rng.multinomial(seeds, [1 / seeds] * seeds, size=resamples) / seeds  # (resamples, K)
        weights[np.arange(resamples), drawn[:, place]] += by_seed[:, :, None] * by_prompt[:, None, :] / subjects
    return weights


def weighted(scores: Array, weights: Array) -> Array:
    """Averages of scores in each resample.

    scores: `(…, S, K, P)`. weights: `(resamples, S, K, P)`. Returns `(resamples, …)`.
    """
    units = math.prod(weights.shape[1:])
    flat = weights.reshape(-1, units) @ scores.reshape(-1, units).T
    return flat.reshape(len(weights), *scores.shape[:-3])


def estimate(value: float, draws: Array, subjects: int, seeds: int) -> Estimate:
    """A value with its interval.

    value: of all scores. draws: of each resample, NaN where it could not be had. subjects, seeds: how many there are.
    """
    found = draws[np.isfinite(draws)]
    reached = len(found) / len(draws)
    if subjects < 2 or seeds < 2 or reached < SURE or math.isnan(value):
        return Estimate(Interval(value, None, None), reached)
    half = _factor(subjects) * float(found.std())
    return Estimate(Interval(value, value - half, value + half), reached)


def _factor(subjects: int) -> float:
    """Half of an interval's length over the standard deviation of the resamples."""
    return math.sqrt(subjects / (subjects - 1)) * float(student.ppf((1 + LEVEL) / 2, subjects - 1))


def verdict(difference: Estimate) -> str:
    """In words whether we are ahead, for a difference of which more is better."""
    low, high = difference.interval.low, difference.interval.high
    if low is None or high is None:
        return "no interval"
    return "ahead" if low > 0 else "behind" if high < 0 else "not decided"


def detectable_difference(deviation: float, subjects: int, seeds: int, power: float = POWER) -> float | None:
    """The smallest true difference whose interval, as this file makes it, is above 0 with this probability.

    Found by simulation. In a resample of a mean, the variance over seeds comes on top of that over subjects' means,
    which already has it, so the interval is longer than Student's wherever seeds scatter. Here half of the variance of
    a subject's mean is the seeds'. A difference that varies with the prompt is not part of it; it takes more to find.

    deviation: the standard deviation over subjects of the difference between two methods, each subject's a mean over
    its seeds. subjects, seeds: how many. power: the probability. None of fewer than two subjects or seeds, which have
    no interval.
    """
    if subjects < 2 or seeds < 2:
        return None
    rng = np.random.default_rng(0)
    part = deviation / math.sqrt(2)
    scores = rng.normal(0, part, (SIMULATED, subjects, 1))
    scores = scores + rng.normal(0, part * math.sqrt(seeds), (SIMULATED, subjects, seeds))
    means = scores.mean(axis=2)
    variance = (means.var(axis=1) + scores.var(axis=2).mean(axis=1) / seeds) / subjects  # of a resample's mean
    return float(np.quantile(_factor(subjects) * np.sqrt(variance) - means.mean(axis=1), power))


def detectable_by(half_width: float, subjects: int, power: float = POWER) -> float:
    """The smallest true difference whose interval is above 0 with this probability, by how long intervals are.

    Unlike `detectable_difference` this has all that makes the difference scatter, prompts included.

    half_width: half of an interval's length. subjects: how many, two or more. power: the probability.
    """
    return half_width * float(1 + student.ppf(power, subjects - 1) / student.ppf((1 + LEVEL) / 2, subjects - 1))


def half_width_of_more(half_width: float, subjects: int, more: int) -> float:
    """Half of an interval's length with another number of subjects, two or more, that scatter alike.

    What scatters over prompts does not become less with subjects, so with more of them it is a little too short.

    half_width: of `subjects`. more: the other number.
    """
    each = half_width / _factor(subjects) * math.sqrt(subjects)
    return each * _factor(more) / math.sqrt(more)


def pooled_deviation(differences: Sequence[Sequence[float]]) -> float:
    """The standard deviation over subjects of paired differences, pooled over several pairs of methods.

    differences: for each pair one difference a subject, two or more. Raises ValueError if there are none.
    """
    if not differences:
        raise ValueError("no differences to pool")
    return math.sqrt(float(np.mean([np.var(each, ddof=1) for each in differences])))
