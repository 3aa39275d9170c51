from __future__ import annotations

import pytest
import torch

import gsoft
from gsoft.blocks import orthogonal_blocks
from gsoft.rotation import at_strength


@pytest.mark.parametrize("parametrization", ["cayley", "exp"])
def test_the_way_leads_from_the_base_model_to_the_adapter(parametrization):
    """Angles of a single plane, in closed form; scales go straight, also through zero."""
    parameters = {"a.q_in": torch.tensor([[[0.8]]]), "a.output_scale": torch.tensor([2.0, 0.5, -1.0, 3e8])}
    for strength in (0.0, 0.25, 1.0, -1.0):
        moved = at_strength(parameters, strength)
        block = orthogonal_blocks([moved["a.q_in"]], 2, parametrization)[0][0, 0]
        free = torch.tensor(0.8 * strength)
        angle = free if parametrization == "exp" else 2 * free.atan()
        torch.testing.assert_close(block[0], torch.stack([angle.cos(), angle.sin()]))
        if strength in (0.0, 1.0):
            exact = parameters["a.output_scale"] if strength else torch.ones(4)
            assert torch.equal(moved["a.output_scale"], exact)
    assert at_strength(parameters, 0.25)["a.output_scale"][:3].tolist() == [1.25, 0.875, 0.5]


@pytest.mark.parametrize("strength", [float("nan"), float("-inf")])
def test_a_strength_is_a_finite_number(strength):
    with pytest.raises(gsoft.GSOFTError, match=f"its strength {strength} is not a number"):
        at_strength({"a.q_in": torch.ones(1, 1, 1)}, strength)


def change_of_a_step(config, width: int, target: torch.Tensor) -> float:
    """How far one step of Adam at the rate 1e-4 turns what a layer makes of one vector, towards a target, relative."""
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False))
    torch.nn.init.orthogonal_(model[0].weight, generator=generator)
    x = torch.randn(1, width, generator=generator)
    before = model(x).detach()
    adapter = gsoft.inject(model, config)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-4, eps=1e-30)
    (model(x) - before).sub(target[:, :width]).square().mean().backward()
    optimizer.step()
    return ((model(x) - before).norm() / before.norm()).item()


@pytest.mark.filterwarnings("ignore:Q is not dense")
def test_a_step_turns_all_sizes_alike():
    """Blocks from 4 to 160, one and more factors, one and two sides, both maps: within a factor of 1.5."""
    target = torch.randn(1, 640, generator=torch.Generator().manual_seed(0))
    settings = [
        (64, {"block_size": 4}),
        (64, {"block_size": 16, "nfactors": 1, "double": False}),
        (64, {"block_size": 8, "nfactors": "dense"}),
        (320, {"block_size": 10, "parametrization": "scaled_exp"}),
        (320, {"block_size": 80, "nfactors": 3}),
        (640, {"block_size": 160, "double": False}),
        (640, {"block_size": 20}),
    ]
    changes = [change_of_a_step(gsoft.Config(**options, output_scale=False), n, target) for n, options in settings]
    assert max(changes) < 1.5 * min(changes), changes
