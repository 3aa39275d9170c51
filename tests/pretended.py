"""Whole runs on a GPU that is not there.

Not pretended are bitsandbytes' layers and optimizers and xformers' attention, which are kernels for real GPUs; several
GPUs, which talk by NCCL; and the estimate of a step's memory, which itself uses tensors on the meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import transformers
from accelerate.state import AcceleratorState

from benchmarks.pretended_gpu import PretendedGPU
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.training import preflight
from gsoft_diffusion.training.step import TrainingStep
from gsoft_diffusion.training.train import TrainingResult, train


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """A `PretendedGPU` in which everything can be called that a command calls: models are loaded in main memory."""
    with PretendedGPU() as gpu:
        readers = [_in_main_memory(gpu, kind) for kind in (diffusers.ModelMixin, transformers.PreTrainedModel)]
        AcceleratorState._reset_state(reset_partial_state=True)  # which has chosen a device
        try:
            with readers[0], readers[1], mock.patch.object(preflight, "step_bytes", return_value=0):
                yield gpu
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _in_main_memory(gpu: PretendedGPU, kind: Any) -> Any:
    """A patch of `kind.from_pretrained`."""
    original = kind.from_pretrained.__func__

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        with gpu.suspended():
            return original(cls, *arguments, **options)

    return mock.patch.object(kind, "from_pretrained", classmethod(from_pretrained))


@dataclass
class PretendedTraining:
    """What a run gave, and where each of its steps waited for the GPU: by the places that `PretendedGPU.waits` names.

    A step's waits are those since the step before, so what is done between two steps counts for the second of them.
    """

    result: TrainingResult
    waits: list[Counter[str]] = field(default_factory=list)


def pretended_training(config: TrainingConfig) -> PretendedTraining:
    """Train on a pretended GPU."""
    update, waits = TrainingStep.update, []

    def watched(step: TrainingStep, *arguments: Any) -> None:
        update(step, *arguments)
        waits.append(gpu.waits.copy())
        gpu.reset()

    with pretended_gpu() as gpu, mock.patch.object(TrainingStep, "update", watched):
        return PretendedTraining(train(config), waits)
