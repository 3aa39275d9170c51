"""The orthogonal convolutions as they were published, by their formulas: what ours are measured against.

SOC (Singla and Feizi, ICML 2021, arXiv 2105.11417), and GS-SOC as the group-and-shuffle paper's code has it. Taylor's
series has 5 terms in training and 12 in evaluation. Norms come by power iteration; its vectors are made for other
weights than those that the layer starts with, and they move on in training only. In layers of stride 2 channels are
shuffled before space-to-depth, and the first outputs are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsoft import channel_shuffle

TRAIN_TERMS, EVAL_TERMS = 5, 12
MANY_ITERATIONS = 50  # at the start and at every so many steps; else 1
MANY_EVERY = 200


class PublishedExponential(nn.Module):
    """`exp(L) ⋆ x` of a grouped kernel `L = ½(M − Mᵀ)`, scaled by power iteration."""

    def __init__(self, channels: int, kernel_size: int, groups: int) -> None:
        """channels: of input and output. kernel_size: odd. groups: of the convolution."""
        super().__init__()
        self.groups, self.kernel_size = groups, kernel_size
        self.radius = 1.0 if kernel_size == 1 else 0.7 * kernel_size
        size = channels // groups
        self.weight = nn.Parameter(torch.randn(channels, size, kernel_size, kernel_size) / math.sqrt(size))
        with torch.no_grad():
            for index, matrix in enumerate(self._matrices(self._skew())):
                self.register_buffer(f"left_{index}", torch.empty(groups, matrix.shape[1], 1))
                self.register_buffer(f"right_{index}", F.normalize(torch.randn(groups, matrix.shape[2], 1), dim=1))
            self._iterate(self._skew(), MANY_ITERATIONS)
        self.steps = 0
        nn.init.normal_(self.weight, std=1 / math.sqrt(size))

    def forward(self, x: Tensor) -> Tensor:
        """x: `(B, channels, H, W)`, as the result."""
        skew = self._skew()
        if self.training:
            self._iterate(skew, 1 if self.steps % MANY_EVERY else MANY_ITERATIONS)
            self.steps += 1
        norm = self._norm(skew) * self.kernel_size
        kernel = skew * (self.radius / norm).repeat_interleave(len(skew) // self.groups)[:, None, None, None]
        term = result = x
        for number in range(1, (TRAIN_TERMS if self.training else EVAL_TERMS) + 1):
            term = F.conv2d(term, kernel, padding=self.kernel_size // 2, groups=self.groups) / number
            result = result + term
        return result

    def _skew(self) -> Tensor:
        grouped = self.weight.unflatten(0, (self.groups, -1))
        return (0.5 * (grouped - grouped.transpose(1, 2).flip(3, 4))).flatten(0, 1)

    def _matrices(self, skew: Tensor) -> list[Tensor]:
        """The four reshapes of each group's kernel whose norms bound that of the convolution."""
        kernel = skew.unflatten(0, (self.groups, -1))  # (groups, out, in, height, width)
        orders = ((1, 3, 2, 4), (1, 4, 2, 3)), ((1,), (2, 3, 4)), ((1, 3, 4), (2,))
        mixed = [kernel.permute(0, *order).flatten(1, 2).flatten(2, 3) for order in orders[0]]
        return [*mixed, kernel.flatten(2), kernel.permute(0, 1, 3, 4, 2).flatten(1, 3)]

    @torch.no_grad()
    def _iterate(self, skew: Tensor, iterations: int) -> None:
        for index, matrix in enumerate(self._matrices(skew)):
            left, right = getattr(self, f"left_{index}"), getattr(self, f"right_{index}")
            for _ in range(iterations):
                left.copy_(F.normalize(matrix @ right, dim=1))
                right.copy_(F.normalize(matrix.mT @ left, dim=1))

    def _norm(self, skew: Tensor) -> Tensor:
        """The least of the four norms, `(groups,)`, as far as the vectors know them."""
        norms = [
            (getattr(self, f"left_{index}").mT @ matrix @ getattr(self, f"right_{index}")).flatten()
            for index, matrix in enumerate(self._matrices(skew))
        ]
        return torch.stack(norms).amin(0)


class PublishedConv2d(nn.Module):
    """SOC, or with groups `(a, b)` GS-SOC, as published: nothing is shuffled after space-to-depth."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: tuple[int, int | None] = (1, None),
    ) -> None:
        """The arguments are those of `gsoft.GSConv2d`."""
        super().__init__()
        self.stride, self.groups, self.out_channels = stride, groups, out_channels
        self.channels = max(in_channels * stride**2, out_channels)
        first, second = groups
        self.spatial = PublishedExponential(self.channels, kernel_size, first)
        self.pointwise = None if second is None else PublishedExponential(self.channels, 1, second)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: `(B, in_channels, H, W)`; returns `(B, out_channels, H/stride, W/stride)`."""
        first, second = self.groups
        x = F.pixel_unshuffle(channel_shuffle(x, first, paired=True), self.stride)
        x = self.spatial(F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1])))
        if self.pointwise is not None:
            x = self.pointwise(channel_shuffle(x, second or 1, paired=True))
        return x[:, : self.out_channels] + self.bias[:, None, None]
