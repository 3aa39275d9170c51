"""The arithmetic of the pretraining scripts' forward passes."""

from __future__ import annotations

import torch


def fast_autocast() -> torch.autocast:
    """bfloat16 where the processor multiplies in it, float32 elsewhere: emulated bfloat16 is ten times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())
