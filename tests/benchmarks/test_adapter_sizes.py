"""The sizes of adapters that are committed, and told in docs/models.md, are those that adapters have.

`UPDATE_DOCS=1 python -m pytest tests/benchmarks/test_adapter_sizes.py` writes the table anew.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.adapter_sizes import sizes, table
from benchmarks.bases import PUBLISHED
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.adapters.size import with_usual_size
from gsoft_diffusion.config import AdapterConfig

ROOT = Path(__file__).parents[2]
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "adapter_sizes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "FLUX.2 klein 4B", "FLUX.2 dev"])
def test_committed_sizes(name):
    assert sizes(PUBLISHED[name]) == COMMITTED[name]


def test_there_is_a_size_for_every_published_model_and_none_is_half_a_gigabyte():
    assert COMMITTED.keys() == PUBLISHED.keys()
    assert max(one["bytes"]["default"] for one in COMMITTED.values()) < 500e6


def test_sizes_are_those_of_adapters():
    denoiser, _ = PUBLISHED["FLUX.2 klein 4B"].networks()
    adapter = inject(AdapterConfig(text_encoder=False), denoiser)
    assert adapter.config.block_size == 64
    assert (
        sum(tensor.nbytes for tensor in adapter.state_dict().values())
        == (COMMITTED["FLUX.2 klein 4B"]["bytes"]["default"])
    )


def test_the_table_in_the_documentation():
    page = ROOT / "docs" / "models.md"
    lines, text = table(COMMITTED), page.read_text(encoding="utf-8")
    (written,) = re.findall(rf"^{re.escape(lines[0])}\n(?:\|.*\n)+", text, re.MULTILINE)
    wanted = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(text.replace(written, wanted), encoding="utf-8")
    else:
        assert written == wanted


def linears(*shapes: tuple[int, int]) -> dict[str, nn.Linear]:
    with torch.device("meta"):
        return {f"unet.{place}": nn.Linear(*shape) for place, shape in enumerate(shapes)}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(2048, 320), (320, 320)], {"nblocks": 32}),
        ([(3072, 3072), (768, 768)], {"block_size": 64}),
        ([(3072, 3072), (96, 3072)], {"block_size": 32}),  # the largest that divides every width
        ([(3072, 3072), (99, 3072)], {"nblocks": 32}),  # none does
        ([(3072, 3072)] * 400, {"block_size": 32}),  # 64 would be 624 MB
        ([(3072, 3072)] * 3000, {"block_size": 16}),  # the smallest there is, though too large
    ],
)
def test_the_base_model_decides_the_size(shapes, expected):
    config = AdapterConfig(nfactors=2, parametrization="exp")
    found = with_usual_size(config, linears(*shapes))
    assert found == AdapterConfig(nfactors=2, parametrization="exp", **expected)


@pytest.mark.parametrize("given", [{"nblocks": 32}, {"block_size": 128}])
def test_what_is_given_counts(given):
    config = AdapterConfig(**given)
    assert with_usual_size(config, linears((3072, 3072))) is config


def test_other_settings_count():
    """One-sided adapters are half as large."""
    many = linears(*[(3072, 3072)] * 400)
    assert with_usual_size(AdapterConfig(double=False), many).block_size == 64
