from __future__ import annotations

import math

import pytest
import torch
from plain_models import randomise
from torch import nn

from gsoft import (
    Config,
    GSConv2d,
    GSOFTError,
    MaxMin,
    OrthogonalLinear,
    SOCConv2d,
    certified_radius,
    inject,
    lipschitz_bound,
    truncation_error,
)


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

    def test_no_direction_is_stretched_further_and_one_nearly_as_far(self):
        """By the largest singular value of the Jacobian, at some inputs."""
        torch.manual_seed(0)
        network = nn.Sequential(SOCConv2d(3, 8, 3), MaxMin(), GSConv2d(8, 8, 3, 2, groups=(2, 1)), MaxMin()).eval()
        for x in torch.randn(3, 1, 3, 4, 4):
            jacobian = torch.autograd.functional.jacobian(network, x).reshape(32, 48)
            largest = torch.linalg.svdvals(jacobian)[0]
            assert 0.85 < largest <= lipschitz_bound(network) + 1e-6

    def test_an_orthogonal_linear_layer_has_one(self):
        for widths in ((12, 12), (8, 12), (12, 8)):
            layer = OrthogonalLinear(*widths, block_size=3)
            randomise(layer, size=1)
            assert lipschitz_bound(nn.Sequential(layer, MaxMin(dim=-1))) == pytest.approx(1, abs=1e-5)

    def test_a_layer_that_comes_twice_counts_twice(self):
        linear = nn.Linear(4, 4)
        once = lipschitz_bound(nn.Sequential(linear))
        assert lipschitz_bound(nn.Sequential(linear, MaxMin(), linear)) == pytest.approx(once**2)

    def test_what_is_dropped_in_training_makes_the_rest_larger(self):
        layer = nn.Dropout(0.75)
        assert lipschitz_bound(layer) == 4
        assert lipschitz_bound(layer.eval()) == 1

    def test_a_subclass_that_computes_something_else_is_not_known(self):
        class Residual(nn.Sequential):
            def forward(self, x):
                return x + super().forward(x)

        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        for module in (Residual(nn.Identity()), Doubled(4, 4)):
            with pytest.raises(GSOFTError, match=f"no bound .* of {type(module).__name__} is known"):
                lipschitz_bound(module)

    @pytest.mark.parametrize(
        ("base", "arguments"), [(SOCConv2d, {"kernel_size": 3}), (OrthogonalLinear, {"block_size": 2})]
    )
    def test_a_bound_is_of_the_forward_that_it_was_written_for(self, base, arguments):
        class Renamed(base):
            pass

        class Tripled(Renamed):
            def forward(self, x):
                return 3 * super().forward(x)

        class Stated(Tripled):
            def lipschitz_bound(self) -> float:
                return 3 * super().lipschitz_bound()

        bound = lipschitz_bound(base(4, 4, **arguments))
        assert lipschitz_bound(Renamed(4, 4, **arguments)) == pytest.approx(bound)
        assert lipschitz_bound(Stated(4, 4, **arguments)) == pytest.approx(3 * bound)
        with pytest.raises(GSOFTError, match=r"no bound .* of Tripled is known"):
            lipschitz_bound(nn.Sequential(Tripled(4, 4, **arguments)))

    def test_an_adapters_layer_is_known_once_it_is_merged(self):
        network = nn.Sequential(nn.Linear(8, 8))
        adapter = inject(network, Config(block_size=4))
        with torch.no_grad():
            adapter.rotated("model.0").rotation.output_scale.fill_(5)
        with pytest.raises(GSOFTError, match="RotatedLinear"):
            lipschitz_bound(network)
        adapter.merge()
        assert lipschitz_bound(network) == pytest.approx(float(torch.linalg.svdvals(network[0].weight)[0]))

    def test_a_module_may_state_its_own(self):
        class Doubled(nn.Module):
            def lipschitz_bound(self) -> float:
                return 2.0

        assert lipschitz_bound(nn.Sequential(Doubled(), Doubled())) == 4

    def test_what_is_not_known_is_named(self):
        with pytest.raises(GSOFTError, match=r"^Sequential\.1\.0: no bound .* of BatchNorm2d is known$"):
            lipschitz_bound(nn.Sequential(MaxMin(), nn.Sequential(nn.BatchNorm2d(4))))
