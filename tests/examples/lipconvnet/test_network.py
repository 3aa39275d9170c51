from __future__ import annotations

import pytest
import torch

import gsoft
from examples.lipconvnet.compare import ROWS, parameters
from examples.lipconvnet.network import Convolutions, LipConvnet
from gsoft_diffusion.foundation.errors import UserError

MEAN, SCALE = torch.tensor([0.5, 0.4, 0.3]), torch.tensor(0.25)
PAPER = {  # millions of parameters of LipConvnet-15, width 32, 100 classes (paper, Table 3), and the last given digit
    "SOC": (24.1, 0.05),
    "(4,–)": (6.81, 0.01),
    "(4,1)": (8.91, 0.01),
    "(4,2)": (7.86, 0.01),
    "(4,4)": (7.3, 0.05),
}


def network(depth: int = 5, width: int = 8, convolutions: Convolutions = ROWS[1], classes: int = 4) -> LipConvnet:
    torch.manual_seed(0)
    return LipConvnet(depth, width, classes, convolutions, MEAN, SCALE)


@pytest.mark.parametrize("row", ROWS[:5], ids=lambda row: row.name)
def test_the_papers_parameters_are_counted(row):
    with torch.device("meta"):
        large = LipConvnet(15, 32, 100, row, MEAN, SCALE)
    counts = parameters(large)
    millions, digit = PAPER[row.name]
    assert counts["parameters_as_in_paper"] / 1e6 == pytest.approx(millions, abs=digit)
    assert counts["learned_numbers"] == pytest.approx(counts["parameters_as_in_paper"] / 2, rel=0.01)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_logits_move_no_further_than_pictures_allow(row):
    """By the largest singular value of the Jacobian, which comes near: orthogonal layers keep the norm of gradients."""
    model, x = network(convolutions=row).eval(), torch.rand(1, 3, 32, 32)
    assert model(x).shape == (1, 4)
    bound = gsoft.lipschitz_bound(model)
    assert bound == pytest.approx(4, rel=1e-4)  # 1 / 0.25
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(4, -1)
    assert 0.85 * bound < torch.linalg.svdvals(jacobian)[0] <= bound


def test_every_number_learns():
    model = network(depth=10)
    (model(torch.rand(8, 3, 32, 32)) * torch.randn(8, 4)).sum().backward()
    assert all((parameter.grad != 0).all() for parameter in model.parameters())


def test_depths_and_widths():
    model = network(depth=10, width=12)
    layers = [layer.layout for layer in model.orthogonal_layers()]
    assert [layout.out_channels for layout in layers] == [12, 24, 24, 48, 48, 96, 96, 192, 192, 384, 4]
    assert [layout.stride for layout in layers] == [1, 2] * 5 + [1]
    assert sum(isinstance(module, gsoft.MaxMin) for module in model) == 10


def test_colours_are_normalised():
    shown = network()[0](torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(shown[0, :, 0, 0], (1 - MEAN) / SCALE)


def test_names():
    assert [row.name for row in ROWS] == [
        "SOC",
        *(f"(4,{b}){pairs}" for pairs in ("", " not paired") for b in ("–", 1, 2, 4)),
    ]


def test_soc_has_no_shuffles_to_pair():
    assert Convolutions(None, paired=False) == Convolutions()


@pytest.mark.parametrize(
    ("depth", "width", "message"),
    [
        (7, 8, "--depth 7 is not a multiple of 5"),
        (0, 8, "--depth 0"),
        (10, 6, "--width or --groups does not fit: GSConv2d"),
    ],
)
def test_what_does_not_fit(depth, width, message):
    with pytest.raises(UserError, match=message):
        network(depth, width)
