"""The arithmetic of the pretraining scripts' forward passes."""

from __future__ import annotations

import torch

CPU = torch.device("cpu")


def fast_autocast(device: torch.device = CPU) -> torch.autocast:
    """bfloat16 where the device multiplies in it, float32 elsewhere: emulated bfloat16 is ten times slower."""
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
