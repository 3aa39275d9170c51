"""How large an adapter is, and the size of its blocks if its settings leave that to the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gsoft.linear_slice import AnyLinear
from gsoft.rotation import parameter_count, rotated_widths
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.config.defaults import BLOCK_SIZES, LARGEST, NBLOCKS

FLOAT32 = 4  # bytes of a number in an adapter's file


def with_usual_size(config: AdapterConfig, linears: Mapping[str, AnyLinear]) -> AdapterConfig:
    """The settings with `nblocks` or `block_size`: what they say, or else what is usual for layers so wide.

    config: the settings. linears: the layers that will be adapted, by name.
    """
    if not config.leaves_size_open:
        return config
    paper = replace(config, nblocks=NBLOCKS)
    widths = {
        width
        for linear in linears.values()
        for width in rotated_widths(paper, linear.in_features, linear.out_features).values()
    }
    sizes = [replace(config, block_size=size) for size in BLOCK_SIZES if all(width % size == 0 for width in widths)]
    if not sizes or max(widths) <= NBLOCKS * max(BLOCK_SIZES):
        return paper
    return next((sized for sized in sizes if adapter_bytes(sized, linears) <= LARGEST), sizes[-1])


def adapter_bytes(config: AdapterConfig, linears: Mapping[str, AnyLinear]) -> int:
    """How many bytes the numbers of an adapter take in its file.

    config: the settings, which must give a size. linears: the layers that are adapted, by name. Raises GSOFTError if a
    width does not fit the settings.
    """
    counts = (parameter_count(config, linear.in_features, linear.out_features) for linear in linears.values())
    return FLOAT32 * sum(counts)
