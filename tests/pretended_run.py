"""Runs on a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import diffusers
import transformers

from benchmarks.pretended_gpu import PretendedGPU
from gsoft_diffusion.training import preflight

READERS = (diffusers.ModelMixin, transformers.PreTrainedModel)


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """A `PretendedGPU` in which models are loaded in main memory, as their libraries do it."""
    with PretendedGPU() as gpu:

        def patched(reader):
            original = reader.from_pretrained.__func__

            def from_pretrained(cls, *arguments, **options):
                with gpu.suspended():
                    return original(cls, *arguments, **options)

            return mock.patch.object(reader, "from_pretrained", classmethod(from_pretrained))

        # The estimate of a step's memory, too, works with tensors on the meta device.
        estimate = mock.patch.object(preflight, "step_bytes", lambda *arguments, **options: 0)
        with patched(READERS[0]), patched(READERS[1]), estimate:
            yield gpu
