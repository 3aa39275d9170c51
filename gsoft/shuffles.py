"""Shuffles of channels between grouped convolutions: the permutations of a group-and-shuffle matrix."""

from __future__ import annotations

from torch import Tensor


def channel_shuffle(x: Tensor, groups: int, paired: bool) -> Tensor:
    """Deal the channels out to groups, one after the other; or pair after pair.

    x: `(…, n, H, W)`. groups: `k`, which divides `n`, and `n/2` for pairs. paired: keep the neighbours `2i` and `2i+1`,
    which `MaxMin` compares, together. Returns the shape of x.

    Channel `i` goes to `(i mod k)·n/k + ⌊i/k⌋` (paper, Definition 5.2), or `(⌊i/2⌋ mod k)·n/k + 2⌊i/2k⌋ + (i mod 2)`
    in pairs (paper, §6.3).
    """
    if groups == 1:
        return x
    return x.unflatten(-3, (-1, groups, 2 if paired else 1)).transpose(-5, -4).flatten(-5, -3)
