"""Fronts: how much of the prompt a method keeps for how much of the subject. Pure functions.

A *setting* of a method is a learning rate and a number of steps. A *point* is a setting's (subject fidelity, prompt
fidelity), each averaged over subjects, seeds and prompts.

**Front.** The upper concave hull of a method's points, from the one that keeps most of the prompt to the one that has
most of the subject. Drawing some pictures with one setting and the rest with another has the mean scores of a place on
the line between them, so a front is what the method can do with its settings, and more settings never lower it. The
base model is a point of every method: that is no steps at all. (Its pictures are drawn by the prompt without the unique
token, which it does not know.)

**Area.** With `F₀, T₀` the fidelities of the base model and `F₁, T₁` those of the photos themselves (their `T₁` is that
of a model which copies them), shares of the way are

    f = (F − F₀) / (F₁ − F₀)        t = (T − T₁) / (T₀ − T₁)        area = ∫₀¹ max(0, min(1, t(f))) df

where `t(f)` is the front's prompt fidelity. Left of its first point it counts as that point's, which has more of the
subject at that prompt fidelity; right of its last it counts as 0, since no setting has so much of the subject. 0 is a
method that gives up the prompt at once, 1 one that learns the subject and keeps all of the prompt.

**Lead.** An area also measures how far the settings reach that happened to be tried. So what decides is the lead of one
front over another, the mean of `t(f) − t′(f)` over all `f` in [0, 1] that both fronts reach: how much more of the
prompt is kept at equal subject fidelity.

Every point is a mean of few pictures, and a hull takes the best of them. So a front is a little too high, the more so
the more settings lie close together; `tests/eval/report/test_fronts.py` says how much of that is left in a lead.
"""

from __future__ import annotations

import math

import numpy as np

from eval.report.intervals import Array

Pair = tuple[float, float]  # subject fidelity, prompt fidelity

SHARES = (0.25, 0.5, 0.75)  # of the way between the ends, where fronts are read


def front(points: Array) -> Array:
    """The corners of the points' upper concave hull, `(M, 2)`, from little of the subject to much.

    points: `(N, 2)`, subject and prompt fidelity; NaN where a training diverged. Points that another beats in both, and
    those not above a line between two others, are left out.
    """
    kept: list[Array] = []
    finite = points[np.isfinite(points).all(axis=1)]
    for point in finite[np.lexsort((-finite[:, 1], -finite[:, 0]))]:  # from much of the subject to little
        if kept and point[1] <= kept[-1][1]:
            continue
        while len(kept) > 1 and _not_above(kept[-1], kept[-2], point):
            kept.pop()
        kept.append(point)
    return np.array(kept[::-1]).reshape(-1, 2)


def _not_above(point: Array, one: Array, other: Array) -> bool:
    """Whether a point, whose subject fidelity is between those of two others, is not above the line between them."""
    share = (point[0] - one[0]) / (other[0] - one[0])
    return bool(point[1] <= one[1] + share * (other[1] - one[1]))


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


def lead_range(points: Array, others: Array, base: Pair, photos: Pair) -> float:
    """Up to which share of the way from base model to photos both fronts reach, at most 1: what a lead is taken of.

    points, others, base, photos: as in `lead`, the ends in order.
    """
    reaches = [_shares(front_with_base(each, base), base, photos)[0][-1] for each in (points, others)]
    return float(min(1.0, *reaches))


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
