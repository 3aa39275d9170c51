"""Fronts: how much of the prompt a method keeps for how much of the subject, and how sure that is. Pure functions.

A *setting* of a method is a learning rate and a number of steps. Its scores are an array `(S, K, P)`: a subject, a seed
and a prompt each, averaged over the pictures of that prompt. A *point* is a setting's (subject fidelity, prompt
fidelity), each averaged over all three.

**Front.** Of a method's points those that no other point beats in both, joined by straight lines. The base model is a
point of every method: that is no steps at all. Drawing some pictures with one setting and the rest with its neighbour
has the mean scores of a place on the line between them, so a front promises nothing that the method cannot do.

**Area.** With `F₀, T₀` the fidelities of the base model and `F₁, T₁` those of the photos themselves (their `T₁` is that
of a model which copies them), shares of the way are

    f = (F − F₀) / (F₁ − F₀)        t = (T − T₁) / (T₀ − T₁)        area = ∫₀¹ max(0, min(1, t(f))) df

where `t(f)` is the front's prompt fidelity. Left of its first point it counts as that point's, which has more of the
subject at that prompt fidelity; right of its last it counts as 0, since no setting has so much of the subject. 0 is a
method that gives up the prompt at once, 1 one that learns the subject and keeps all of the prompt.

**Lead.** An area also measures how far the settings reach that happened to be tried. So what decides is the lead of one
front over another, the mean of `t(f) − t′(f)` over all `f` in [0, 1] that both fronts reach: how much more of the
prompt is kept at equal subject fidelity.

**Intervals.** A hierarchical bootstrap: of a resample, `S` subjects are drawn with replacement, for each of them `K` of
its seeds, and `P` prompts, the same for all subjects, since a prompt that is hard is hard for all. Everything is
computed anew from the resample: ends, points, fronts, differences. All methods have the same draws, so their
differences are paired. With few subjects the plain percentile interval is too short; it is widened as Hesterberg (2015,
"What Teachers Should Know About the Bootstrap", §3.3) does, so that it is as long as Student's for a mean of `S`
values: its lower bound is the quantile at `Φ(−√(S/(S−1))·t)`, with `t` Student's quantile at `S − 1` degrees of
freedom. One subject or one seed says nothing of the spread over subjects or seeds, so it gives no interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from gsoft_diffusion.scoring.metrics import Interval

Array = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)
Pair = tuple[float, float]  # subject fidelity, prompt fidelity

LEVEL = 0.95  # of intervals
POWER = 0.8
RESAMPLES = 2000
SHARES = (0.25, 0.5, 0.75)  # of the way between the ends, where fronts are read
SIMULATED = 20_000  # comparisons, to see which difference they find
SURE = 0.95  # share of the resamples that must have a value, or there is no interval of it


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


def front(points: Array) -> Array:
    """The points that no other beats in both, `(M, 2)`, from little of the subject to much.

    points: `(N, 2)`, subject and prompt fidelity; NaN where a training diverged. Of equal points one is kept.
    """
    kept: list[Array] = []
    best = -math.inf
    finite = points[np.isfinite(points).all(axis=1)]
    for point in finite[np.lexsort((-finite[:, 1], -finite[:, 0]))]:  # from much of the subject to little
        if point[1] > best:
            kept.append(point)
            best = point[1]
    return np.array(kept[::-1]).reshape(-1, 2)


def front_with_base(points: Array, base: Pair) -> Array:
    """The front of a method's points and of the base model, its setting without steps; as `front`.

    points: `(N, 2)`. base: (subject fidelity, prompt fidelity).
    """
    return front(np.vstack([points, base]))


def _in_order(base: Pair, photos: Pair) -> bool:
    """Whether the photos have more of the subject, and the base model more of the prompt."""
    return photos[0] > base[0] and base[1] > photos[1]


def _shares(envelope: Array, base: Pair, photos: Pair) -> tuple[Array, Array]:
    """`f` and `t` of a front's points."""
    f = (envelope[:, 0] - base[0]) / (photos[0] - base[0])
    return f, (envelope[:, 1] - photos[1]) / (base[1] - photos[1])


def lead(points: Array, others: Array, base: Pair, photos: Pair) -> float:
    """How much more of the prompt a front keeps than another at equal subject fidelity, see the head of this file.

    points, others: `(N, 2)` and `(M, 2)`, of the two methods. base, photos: the ends. NaN if these are not in order, or
    if one of the methods has no more of the subject than the base model in any setting.
    """
    if not _in_order(base, photos):
        return math.nan
    (f, t), (g, u) = (_shares(front_with_base(each, base), base, photos) for each in (points, others))
    last = min(1.0, f[-1], g[-1])
    if last <= 0:
        return math.nan
    knots = np.unique(np.clip([0.0, *f, *g], 0.0, last))
    return float(np.trapezoid(np.interp(knots, f, t) - np.interp(knots, g, u), knots) / last)


def leads(points: Array, others: Array, ends: Array) -> Array:
    """The `lead` in each resample.

    points, others: `(resamples, N, 2)` and `(resamples, M, 2)`. ends: `(resamples, 2, 2)`, of base model and photos.
    """
    return np.array(
        [
            lead(ours, theirs, tuple(base), tuple(photos))
            for ours, theirs, (base, photos) in zip(points, others, ends, strict=True)
        ]
    )


def area(envelope: Array, base: Pair, photos: Pair) -> float:
    """The area under a front between base model and photos, see the head of this file; between 0 and 1.

    envelope: `(M, 2)`, as `front` gives it. base, photos: (subject fidelity, prompt fidelity) of the ends. NaN if the
    ends are not in order: the photos must have more of the subject, the base model more of the prompt.
    """
    if not _in_order(base, photos):
        return math.nan
    if not len(envelope):
        return 0.0
    f, t = _shares(envelope, base, photos)
    end = min(1.0, float(f[-1]))
    if end <= 0:
        return 0.0
    bends = np.interp([0.0, 1.0], t[::-1], f[::-1])  # where the cut to [0, 1] begins and ends
    knots = np.unique(np.clip([0.0, end, *f, *bends], 0.0, end))
    heights = np.clip(np.interp(knots, f, t), 0.0, 1.0)
    return float(np.trapezoid(heights, knots))


def prompt_at(envelope: Array, subject: float) -> float:
    """Prompt fidelity of a front at a subject fidelity; NaN where the front does not reach.

    envelope: `(M, 2)`, as `front` gives it. subject: the level.
    """
    if not len(envelope) or not envelope[0, 0] <= subject <= envelope[-1, 0]:
        return math.nan
    return float(np.interp(subject, envelope[:, 0], envelope[:, 1]))


def subject_at(envelope: Array, prompt: float) -> float:
    """Subject fidelity of a front at a prompt fidelity; NaN where the front does not reach.

    envelope: `(M, 2)`, as `front` gives it. prompt: the level.
    """
    return prompt_at(envelope[::-1, ::-1], prompt)


def levels(base: Pair, photos: Pair) -> tuple[list[float], list[float]]:
    """The subject fidelities at which prompt fidelities are read, and the reverse: `SHARES` of the way.

    base, photos: the ends, (subject fidelity, prompt fidelity) each. The way of the subject is from the base model to
    the photos, that of the prompt from the photos to the base model.
    """
    subject = [base[0] + share * (photos[0] - base[0]) for share in SHARES]
    return subject, [photos[1] + share * (base[1] - photos[1]) for share in SHARES]


def measures(points: Array, base: Pair, photos: Pair) -> list[float]:
    """All that is read from the front of some points: its area, prompt fidelities and subject fidelities at `levels`.

    points: `(N, 2)`. base, photos: the ends. What the front does not reach is NaN.
    """
    envelope = front_with_base(points, base)
    at_subject, at_prompt = levels(base, photos)
    return [
        area(envelope, base, photos),
        *(prompt_at(envelope, level) for level in at_subject),
        *(subject_at(envelope, level) for level in at_prompt),
    ]


def measured(points: Array, ends: Array) -> Array:
    """`measures` of each resample, `(resamples, measures)`.

    points: `(resamples, N, 2)`. ends: `(resamples, 2, 2)`, those of base model and photos.
    """
    return np.array(
        [measures(each, tuple(base), tuple(photos)) for each, (base, photos) in zip(points, ends, strict=True)]
    )


def bootstrap(scores: Mapping[Key, Sequence[float]]) -> Interval:
    """Mean over subjects and its interval, as `metrics.bootstrap` gives it, but by the rules of this file.

    scores: for each subject one score a seed, of all subjects the same number.
    """
    values = np.array(list(scores.values()), dtype=np.float64)[:, :, None]
    draws = weighted(values, resampled_weights(values.shape))
    return estimate(float(values.mean()), draws, *values.shape[:2]).interval


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


def estimate(value: float, draws: Array, subjects: int, seeds: int) -> Estimate:
    """A value with its interval.

    value: of all scores. draws: of each resample, NaN where it could not be had. subjects, seeds: how many there are.
    """
    found = draws[np.isfinite(draws)]
    reached = len(found) / len(draws)
    if subjects < 2 or seeds < 2 or reached < SURE or math.isnan(value):
        return Estimate(Interval(value, None, None), reached)
    tail = norm.cdf(-math.sqrt(subjects / (subjects - 1)) * student.ppf((1 + LEVEL) / 2, subjects - 1))
    low, high = np.quantile(found, [tail, 1 - tail])
    return Estimate(Interval(value, float(low), float(high)), reached)


def verdict(difference: Estimate) -> str:
    """In words whether we are ahead, for a difference of which more is better."""
    low, high = difference.interval.low, difference.interval.high
    if low is None or high is None:
        return "no interval"
    return "ahead" if low > 0 else "behind" if high < 0 else "not decided"


def held_out(balances: Array, own: Sequence[int | None]) -> list[int]:
    """For each subject the setting that is best on all others, so that no score of its own chose it.

    balances: `(N, S)`, of each setting on the subjects that choose. NaN where a training diverged: it rules the setting
    out for all. own: for each reported subject its place among these; None if it is not among them. Raises ValueError
    if there is no other subject, or no setting is left.
    """
    if balances.shape[1] < 2 and any(place is not None for place in own):
        raise ValueError("a setting cannot be chosen on other subjects if there is one only")
    usable = np.where(np.isfinite(balances).all(axis=1, keepdims=True), balances, -np.inf)
    if not np.isfinite(usable).any():
        raise ValueError("every setting diverged")
    others = [usable if place is None else np.delete(usable, place, axis=1) for place in own]
    return [int(each.mean(axis=1).argmax()) for each in others]


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
    half_widths = math.sqrt(subjects / (subjects - 1)) * student.ppf((1 + LEVEL) / 2, subjects - 1) * np.sqrt(variance)
    return float(np.quantile(half_widths - means.mean(axis=1), power))


def pooled_deviation(differences: Sequence[Sequence[float]]) -> float:
    """The standard deviation over subjects of paired differences, pooled over several pairs of methods.

    differences: for each pair one difference a subject, two or more. Raises ValueError if there are none.
    """
    if not differences:
        raise ValueError("no differences to pool")
    return math.sqrt(float(np.mean([np.var(each, ddof=1) for each in differences])))
