"""Small models of PyTorch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gsoft.blocks import skew_factor
from gsoft.rotation import Rotation


def mlp(seed: int = 0) -> nn.Sequential:
    """Widths 12, 24, 24 and 3."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24, bias=False), nn.GELU(), nn.Linear(24, 3))


def encoder_layer(seed: int = 0) -> nn.TransformerEncoderLayer:
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(24, 4, dim_feedforward=48, dropout=0.0, batch_first=True)


class TiedModel(nn.Module):
    """An embedding whose matrix is the output layer's as well, as in many language models."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.body, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


class Recurrent(nn.Module):
    """Calls one layer twice, which it also holds in two places."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(12, 12)
        self.again = self.first
        self.out = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(torch.tanh(self.first(x))))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Move every parameter away from its start, as training would; size: of the blocks' entries, and of the rest."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for rotation in module.modules():
        if isinstance(rotation, Rotation):
            double = rotation.q_out is not None
            for free, side in ((rotation.q_in, rotation.block_size_in), (rotation.q_out, rotation.block_size_out)):
                if free is not None:
                    factors[free] = skew_factor(rotation.parametrization, side, len(free), double)
    for parameter in module.parameters():
        parameter += size / factors.get(parameter, 1) * torch.randn(parameter.shape, generator=generator)
