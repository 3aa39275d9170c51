"""The best step of a run so far, by its validation pictures, and the adapter as of that step.

Best is the highest balance (see `scoring.metrics.balance`): likeness to the photos counts only as far as the prompts
are followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from gsoft_diffusion.config import TrainingConfig


@dataclass(frozen=True)
class Best:
    """The best step, its balance, and the adapter's tensors as its pictures were drawn with, on the CPU.

    judged_by: what balances depend on besides the adapter; only those of the same can be compared.
    """

    step: int
    balance: float
    judged_by: Mapping[str, Any]
    adapter: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values, as `from_dict` takes them."""
        return {name: getattr(self, name) for name in ("step", "balance", "judged_by", "adapter")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave."""
        return cls(**values)


def no_longer_improves(config: TrainingConfig, best: Best | None, judged: int) -> bool:
    """Whether as many validations as `patience` says have brought nothing better, so that the run is over.

    config: the run's settings. best: the best step so far; None if no step had a balance above 0. judged: the last step
    whose pictures were scored.
    """
    if config.keep != "best" or config.patience == 0 or best is None:
        return False
    return judged - best.step >= config.patience * config.validation_steps
