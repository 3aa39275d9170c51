"""How strong each of several adapters is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gsoft_diffusion.foundation.errors import UserError


def strength_by_adapter(adapters: Sequence[str], strengths: Sequence[float]) -> dict[str, float]:
    """Each adapter's strength, in the adapters' order; 1 if none is given.

    adapters: paths, as given. strengths: one for each adapter, or none at all.

    Raises UserError if no adapter is named or one comes twice, and for strengths that are not finite or not as many.
    """
    if not (adapters and all(adapters)):
        raise UserError("--adapter: name the adapter file that training wrote")
    if twice := [adapter for adapter in adapters if list(adapters).count(adapter) > 1]:
        raise UserError(f"--adapter {twice[0]}: comes twice; give it once, with a --strength")
    if strengths and len(strengths) != len(adapters):
        raise UserError(f"--strength: give one for each --adapter, {len(adapters)} and not {len(strengths)}")
    if not all(map(math.isfinite, strengths)):
        raise UserError(f"--strength {' '.join(map(str, strengths))}: must be finite numbers")
    return dict(zip(adapters, strengths or (1.0,) * len(adapters), strict=True))
