from __future__ import annotations

import pytest
import torch

from gsoft import channel_shuffle
from gsoft.group_and_shuffle import permutation_matrix


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (16, 4), (24, 4), (24, 3), (6, 1)])
def test_goes_where_the_formula_says(channels, groups):
    x = torch.arange(channels).float()[:, None, None].expand(-1, 2, 3)
    shuffled = channel_shuffle(x, groups, paired=True)
    for i in range(channels):
        place = (i // 2 % groups) * channels // groups + 2 * (i // (2 * groups)) + i % 2
        assert (shuffled[place] == i).all()
    unpaired = channel_shuffle(x[None], groups, paired=False)[0, :, 0, 0]
    assert torch.equal(unpaired, permutation_matrix(groups, channels) @ x[:, 0, 0])


def test_pairs_stay_pairs():
    shuffled = channel_shuffle(torch.arange(24)[:, None, None], 4, paired=True).flatten().unflatten(0, (-1, 2))
    assert (shuffled[:, 1] == shuffled[:, 0] + 1).all()
    assert (shuffled[:, 0] % 2 == 0).all()
