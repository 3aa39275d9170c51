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


def failed_validations(state: Mapping[str, Any], config: TrainingConfig) -> int:
    """How many validations a checkpoint's run has had since its best step.

    state: the checkpoint's; one of an earlier version has no count, and it is taken from the steps between. config: the
    settings of the run that goes on.
    """
    best = state.get("best")
    if "failed" in state or not best or not config.validation_steps:
        return state.get("failed", 0)
    return max(0, state.get("judged", 0) - best["step"]) // config.validation_steps


def no_longer_improves(config: TrainingConfig, best: Best | None, failed: int) -> bool:
    """Whether as many validations as `patience` says have brought nothing better, so that the run is over.

    config: the run's settings. best: the best step so far; None if no step had a balance above 0. failed: how many
    validations there were since then.
    """
    return config.keep == "best" and 0 < config.patience <= failed and best is not None
