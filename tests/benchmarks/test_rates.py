from __future__ import annotations

import pytest

from benchmarks import rates


@pytest.mark.filterwarnings("ignore:Q is not dense")
def test_the_layer_learns_what_is_asked_and_forgets_more_at_a_higher_rate():
    slow, right, fast = (rates.train("scaled_cayley", 64, 8, 0, rate) for rate in (1e-6, 1e-3, 0.1))
    assert slow["asked"] > 0.9
    assert right["asked"] < 0.1
    assert fast["unrelated"] > 2 * right["unrelated"] > 2 * slow["unrelated"]


def test_the_best_rate_is_found_between_those_tried(monkeypatch):
    """Of errors that are a parabola around 3e-3 on logarithmic scales, twice as large at the larger size."""
    monkeypatch.setattr(rates, "SIZES", ((64, 4), (64, 8)))
    records = []
    for (_, size), exponent in ((pair, e) for pair in rates.SIZES for e in range(4, 15)):
        rate = 2.0**-exponent
        error = (size / 4) * rates.math.exp(rates.math.log(rate / 3e-3) ** 2)
        known = {"parametrization": "cayley", "width": 64, "block_size": size, "seed": 0, "rate": rate}
        records.append(known | {"asked": error / 2, "unrelated": error / 2})
    found = rates.best_rates(records)["cayley"]
    assert list(found.values()) == pytest.approx([3e-3, 3e-3])
    rate, worst = rates.one_rate(records, "cayley")
    assert (rate, worst) == (2.0**-8, 1.0)
    assert "| largest / smallest |  | 1.0 |" in rates.summary(records)
