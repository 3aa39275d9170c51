from __future__ import annotations

import pytest
import torch

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
