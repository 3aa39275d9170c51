"""The methods that are compared, at sizes that match each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from eval.baselines import BaselineConfig, baseline_count, expected_parameters
from gsoft.errors import GSOFTError
from gsoft.linear_slice import AnyLinear
from gsoft.rotation import parameter_count, parameter_shapes
from gsoft_diffusion.config.adapter import AdapterConfig
from gsoft_diffusion.foundation.errors import UserError

AnyConfig = AdapterConfig | BaselineConfig

METHODS = {  # name in tables
    "double_gsoft": "Double GSOFT",
    "gsoft": "GSOFT",
    "lora": "LoRA",
    "dora": "DoRA",
    "boft": "BOFT",
    "oft": "OFT v2",
    "hra": "HRA",
    "lokr": "LoKr",
    "full": "Full fine-tuning",
}
ABLATIONS = {  # Double GSOFT with one thing changed; GSOFT itself is the one with rotations on one side only
    "double_gsoft_dense": "Double GSOFT, dense Q",
    "double_gsoft_unscaled": "Double GSOFT, no output scale",
    "double_gsoft_denoiser": "Double GSOFT, no text encoder",
}
TITLES = METHODS | ABLATIONS
# Share of the numbers that full fine-tuning of the same layers trains; in Stable Diffusion 2's UNet 6.6, 13.3 and 26.6
# million of 99.9, the three groups of the paper's Table 2.
BUDGETS = {"small": 0.066, "medium": 0.133, "large": 0.266}
POWERS = (2, 4, 8, 16, 32, 64, 128)


def matched(
    method: str, budget: str, layers: Mapping[str, AnyLinear], text_encoder: bool, output_scale: bool = True
) -> AnyConfig:
    """The method's settings whose number of parameters comes nearest to the budget.

    method: a key of `TITLES`; full fine-tuning has one size. budget: a key of `BUDGETS`. layers: all that methods adapt
    in the comparison. text_encoder: whether this one adapts the text encoder's. output_scale: of GSOFT and Double
    GSOFT. Double GSOFT without its scale or the text encoder keeps the blocks that it has with them. Raises UserError
    if nothing fits the widths.
    """
    if method in ("double_gsoft_unscaled", "double_gsoft_denoiser"):
        whole = matched("double_gsoft", budget, layers, text_encoder, output_scale)
        assert isinstance(whole, AdapterConfig)
        return replace(whole, output_scale=output_scale and method != "double_gsoft_unscaled")
    widths = [(linear.in_features, linear.out_features) for linear in layers.values()]
    target = BUDGETS[budget] * sum(math.prod(pair) for pair in widths)
    candidates = _candidates(method, text_encoder, output_scale, min(min(pair) for pair in widths))
    fitting = [
        (abs(math.log(count / target)), number, config)
        for number, config in enumerate(candidates)
        if (count := count_parameters(config, layers)) is not None
    ]
    if not fitting:
        raise UserError(
            f"{method}: no size of it fits the model's widths {sorted({n for pair in widths for n in pair})}"
        )
    return min(fitting)[2]


def count_parameters(config: AnyConfig, layers: Mapping[str, AnyLinear]) -> int | None:
    """How many free numbers the settings train in these layers; None if a width does not fit.

    config: a method and its size. layers: by name.
    """
    try:
        total = 0
        for name, linear in layers.items():
            if isinstance(config, BaselineConfig):
                expected_parameters(config, linear.in_features, linear.out_features, name)
                total += baseline_count(config, linear.in_features, linear.out_features)
            else:
                parameter_shapes(config, linear.in_features, linear.out_features, name)
                total += parameter_count(config, linear.in_features, linear.out_features)
    except (UserError, GSOFTError):
        return None
    return total


def adapts_text_encoder(method: str, text_encoder: bool) -> bool:
    """Whether a method adapts the text encoder.

    method: a key of `TITLES`. text_encoder: whether methods do so in the comparison.
    """
    return text_encoder and method != "double_gsoft_denoiser"


def describe(config: AnyConfig) -> str:
    """The size in a few words, as in the paper's table."""
    if isinstance(config, BaselineConfig):
        parts: dict[str, Any] = {"rank": config.rank, "factor": config.factor}
        parts |= {"r": config.nblocks, "b": config.block_size, "m": config.nfactors}
    else:
        parts = {"r": config.nblocks, "b": config.block_size, "m": config.nfactors}
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None) or "all weights"


def _candidates(method: str, text_encoder: bool, output_scale: bool, narrowest: int) -> list[AnyConfig]:
    """Every size worth trying; of two that are equally near the first is taken."""
    if method == "full":
        return [BaselineConfig("full", text_encoder=text_encoder)]
    if method in ("lora", "dora", "hra"):
        ranks = range(2, narrowest, 2) if method == "hra" else range(1, narrowest)
        return [BaselineConfig(method, rank=rank, text_encoder=text_encoder) for rank in ranks]  # type: ignore[arg-type]
    if method == "lokr":
        below: list[int | None] = [None, *range(1, narrowest // 4)]  # None: the second matrix as a whole
        return [BaselineConfig("lokr", factor=2, rank=rank, text_encoder=text_encoder) for rank in below]
    shapes: list[dict[str, int]] = [{name: size} for name in ("nblocks", "block_size") for size in POWERS]
    if method in ("gsoft", "double_gsoft", "double_gsoft_dense"):
        ours: dict[str, Any] = {
            "double": method != "gsoft",
            "nfactors": "dense" if method == "double_gsoft_dense" else 2,
            "text_encoder": text_encoder,
            "output_scale": output_scale,
            "fused_attention": False,  # see `adapted_layers`
        }
        return [AdapterConfig(**(ours | shape)) for shape in shapes]
    if method == "oft":
        return [BaselineConfig("oft", **shape, text_encoder=text_encoder) for shape in shapes]
    if method == "boft":  # with one factor it would be OFT
        several = product(shapes, range(2, 7))
        return [BaselineConfig("boft", **shape, nfactors=m, text_encoder=text_encoder) for shape, m in several]
    raise UserError(f"unknown method {method}; known are {', '.join(TITLES)}")
