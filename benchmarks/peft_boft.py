"""BOFT as PEFT computes it, with all its factors: what `eval.baselines` replaces, for comparison.

PEFT's own forward pass makes an `n × n` matrix of every factor, multiplies it by permutation matrices from both sides
and all of them with each other. Its CUDA extension only puts the blocks on the diagonal; here PyTorch does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.boft import layer as boft
from torch import Tensor, nn

from eval.baselines import PEFT_NAME, ButterflyLinear


class PeftButterflyLinear(ButterflyLinear):
    """PEFT's layer again: the same parameters, PEFT's forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        extension, boft.FastBlockDiag = boft.FastBlockDiag, BlockDiagonal  # type: ignore[assignment, misc]
        try:
            return boft.Linear.forward(self, x, *args, **kwargs)
        finally:
            boft.FastBlockDiag = extension  # type: ignore[misc]


class BlockDiagonal:
    """What the extension computes."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        """`(m, n/b, b, b)` to `(m, n, n)`."""
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def compute_as_peft(models: Iterable[nn.Module]) -> None:
    """Give the BOFT layers in the models PEFT's forward, and the permutation matrices that it reads."""
    for layer in [module for model in models for module in model.modules() if isinstance(module, ButterflyLinear)]:
        nfactors, nblocks, size, _ = layer.boft_R[PEFT_NAME].shape
        permutations = [
            layer.block_butterfly_perm(layer.in_features, nblocks // 2**level, size // 2, nfactors - 1)
            for level in range(nfactors)
        ]
        matrices = torch.stack([layer.perm2mat(permutation) for permutation in permutations])
        layer.boft_P = matrices.to(layer.boft_R[PEFT_NAME].device)
        layer.__class__ = PeftButterflyLinear
