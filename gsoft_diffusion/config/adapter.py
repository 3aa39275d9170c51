"""The settings that decide an adapter's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gsoft.config import RotationConfig
from gsoft.errors import ConfigError
from gsoft_diffusion.config.settings import Settings
from gsoft_diffusion.foundation.errors import UserError


@dataclass(frozen=True)
class AdapterConfig(RotationConfig, Settings):
    """What is adapted and how: the part of the settings that decides the adapter's shapes.

    nblocks: number of diagonal blocks `r` of every GS factor; give this or `block_size`, not both. By default 32 as in
      the paper, on base models whose layers are at most 2048 wide.
    block_size: side `b` of every block, `r·b = width`; by default 64 on base models with wider layers, or less if the
      adapter would be larger than half a gigabyte.
    nfactors: block-diagonal factors in each `Q`; "dense" takes the fewest without zeros in `Q` (paper, Theorem 2).
    double: True for `W' = s·Q_out W Q_in` (§6.2), False for `W' = s·W Q_in` (§6.1).
    parametrization: map from skew-symmetric to orthogonal blocks; with "scaled_" before it, one learning rate fits
      blocks of every size.
    output_scale: learn one factor per output feature, 1 at the start.
    text_encoder: adapt the text encoder's attention as well as the denoiser's.
    fused_attention: adapt the denoiser's attention also where it shares matrices with the feed-forward layer, in
      FLUX.2's single-stream blocks.
    """

    text_encoder: bool = True
    fused_attention: bool = True

    @property
    def leaves_size_open(self) -> bool:
        """Whether the base model decides the blocks: see `gsoft_diffusion.adapters.size`."""
        return self.nblocks is None and self.block_size is None

    def check_size(self) -> None:
        """Raise ConfigError if both sizes are given."""
        if not self.leaves_size_open:
            super().check_size()

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ConfigError as error:
            raise UserError(f"{', '.join(f'--{name}' for name in error.names)}{error.problem}") from error


def recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an adapter as a file of this or an earlier version records them, with what that version did not know.

    values: in full, by name.
    """
    return {"fused_attention": False, **values}


def recorded_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `recorded`, for all settings of a training. values: in full, by name."""
    return {**values, "adapter": recorded(values["adapter"])}
