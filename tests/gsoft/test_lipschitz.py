from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gsoft import GSConv2d, GSOFTError, MaxMin, SOCConv2d, certified_radius, lipschitz_bound, truncation_error


class TestMaxMin:
    def test_sorts_neighbours_or_halves(self):
        x = torch.tensor([3.0, 5, 4, 1, 2, 6])[:, None, None]
        assert MaxMin()(x).flatten().tolist() == [5, 3, 4, 1, 6, 2]
        assert MaxMin("halves")(x).flatten().tolist() == [3, 5, 6, 1, 2, 4]
        assert MaxMin(dim=-1)(x.flatten()).tolist() == [5, 3, 4, 1, 6, 2]
        assert MaxMin(dim=1)(x[None]).shape == (1, 6, 1, 1)

    @pytest.mark.parametrize("pairs", ["neighbours", "halves"])
    def test_its_matrix_is_a_permutation(self, pairs):
        torch.manual_seed(0)
        matrix = torch.autograd.functional.jacobian(MaxMin(pairs, dim=0), torch.randn(8))
        assert torch.equal(matrix @ matrix.mT, torch.eye(8))

    def test_what_cannot_be_paired(self):
        with pytest.raises(GSOFTError, match="5 channels cannot be paired"):
            MaxMin()(torch.zeros(5, 1, 1))
        with pytest.raises(GSOFTError, match="pairs is 'thirds'; valid: 'neighbours', 'halves'"):
            MaxMin("thirds")


def test_the_certified_radius_is_where_a_linear_classifier_changes_its_mind():
    """For orthonormal rows the certificate is exact: the nearest point of another class is as far as it says."""
    torch.manual_seed(0)
    weight = nn.init.orthogonal_(torch.empty(5, 8, dtype=torch.float64))
    x = torch.randn(20, 8, dtype=torch.float64)
    logits = x @ weight.mT
    radius = certified_radius(logits)
    first, second = logits.topk(2).indices.unbind(1)
    toward = (weight[second] - weight[first]) / math.sqrt(2)
    inside, outside = (x + factor * radius[:, None] * toward for factor in (0.999, 1.001))
    assert torch.equal((inside @ weight.mT).argmax(1), first)
    assert torch.equal((outside @ weight.mT).argmax(1), second)
    torch.testing.assert_close(certified_radius(logits, lipschitz=4.0), radius / 4)


class TestLipschitzBound:
    def test_is_the_product_of_the_layers(self):
        torch.manual_seed(0)
        linear = nn.Linear(8, 4)
        network = nn.Sequential(nn.Sequential(SOCConv2d(2, 8, 3), MaxMin()), GSConv2d(8, 8, 3), nn.Flatten(), linear)
        layer = 1 + truncation_error(2.1, 9)
        expected = layer**2 * float(torch.linalg.svdvals(linear.weight.detach().double())[0])
        assert lipschitz_bound(network.eval()) == pytest.approx(expected, rel=1e-7)
        assert lipschitz_bound(network.train()) > 1.02 * expected

    def test_no_two_inputs_are_moved_further_apart(self):
        torch.manual_seed(0)
        network = nn.Sequential(SOCConv2d(3, 8, 3), MaxMin(), GSConv2d(8, 8, 3, 2, groups=(2, 1)), MaxMin()).eval()
        x, y = torch.randn(2, 50, 3, 4, 4)
        apart = (network(x) - network(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        assert apart.max() <= lipschitz_bound(network) + 1e-6

    def test_a_module_may_state_its_own(self):
        class Doubled(nn.Module):
            def lipschitz_bound(self) -> float:
                return 2.0

        assert lipschitz_bound(nn.Sequential(Doubled(), Doubled())) == 4

    def test_what_is_not_known_is_named(self):
        with pytest.raises(GSOFTError, match=r"^Sequential\.1\.0: no bound .* of BatchNorm2d is known$"):
            lipschitz_bound(nn.Sequential(MaxMin(), nn.Sequential(nn.BatchNorm2d(4))))
