from __future__ import annotations

import pytest
from tiny_language import WIDTH

from benchmarks.measure import bytes_in_use
from examples.language.cost import STEPS, measure
from examples.language.training import Run


@pytest.mark.parametrize("task", ["sentiment", "rating"])
def test_a_step_is_timed_and_weighed(encoder, task):
    def run(batch_size: int) -> Run:
        return Run(task, "gsoft", str(encoder), batch_size=batch_size, max_length=12, max_steps=1, evaluations=1)

    small, large = measure(run(8)), measure(run(32))
    assert len(small["seconds"]) == STEPS
    assert min(small["seconds"]) > 0
    if bytes_in_use() is None:
        assert small["kept_bytes"] is None
    else:
        assert 0 < 2 * small["kept_bytes"] < large["kept_bytes"] < 5 * small["kept_bytes"]


def test_rotated_weights_count_as_kept(encoder):
    """The step before has made some, which this one replaces; beside them a few tokens keep next to nothing."""
    kept = measure(Run("sentiment", "gsoft", str(encoder), batch_size=1, max_length=4))["kept_bytes"]
    if kept is None:
        pytest.skip("this C library does not count")
    layers, weights = 2, 4 * WIDTH**2 + 2 * WIDTH * 2 * WIDTH  # of the attention and of the feed-forward part
    assert kept >= layers * weights * 4
