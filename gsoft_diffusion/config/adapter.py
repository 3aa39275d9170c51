"""The settings that decide an adapter's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from gsoft.config import RotationConfig
from gsoft.errors import ConfigError
from gsoft_diffusion.config.settings import Settings
from gsoft_diffusion.foundation.errors import UserError


@dataclass(frozen=True)
class AdapterConfig(RotationConfig, Settings):
    """What is adapted and how: the part of the settings that decides the adapter's shapes.

    nblocks: number of diagonal blocks `r` of every GS factor; give this or `block_size`, not both.
    block_size: side `b` of every block, `r·b = width`.
    nfactors: block-diagonal factors in each `Q`; "dense" takes the fewest without zeros in `Q` (paper, Theorem 2).
    double: True for `W' = s·Q_out W Q_in` (§6.2), False for `W' = s·W Q_in` (§6.1).
    parametrization: map from skew-symmetric to orthogonal blocks; with "scaled_" before it, one learning rate fits
      blocks of every size.
    output_scale: learn one factor per output feature, 1 at the start.
    text_encoder: adapt the text encoder's attention as well as the denoiser's.
    """

    text_encoder: bool = True

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ConfigError as error:
            raise UserError(f"{', '.join(f'--{name}' for name in error.names)}{error.problem}") from error
