"""Double GSOFT as it was published, for comparison: activations are rotated, every call solves for its blocks anew.

Written from the paper (Gorbunov et al., arXiv 2406.10019, §6.1 and §6.2), without what `gsoft` does about
speed: whole `b × b` blocks are learned, each layer solves `Q = (I + K)(I − K)⁻¹` in every call, shuffles look up
indices, and automatic differentiation keeps what it likes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gsoft.group_and_shuffle import permutation_matrix
from gsoft.linear_slice import AnyLinear
from gsoft.rotation import factor_shape
from gsoft_diffusion.adapters.injection import find_attentions, find_clip_attentions, find_linears
from gsoft_diffusion.config import AdapterConfig


class PublishedLinear(nn.Module):
    """`y = s·(Q_out W Q_in x) + bias`."""

    def __init__(self, linear: AnyLinear, config: AdapterConfig) -> None:
        super().__init__()
        self.linear = linear
        for name, width in (("in", linear.in_features), ("out", linear.out_features)):
            nfactors, nblocks, size = factor_shape(config, width, "layer")
            self.register_parameter(f"q_{name}", nn.Parameter(torch.zeros(nfactors, nblocks, size, size)))
            self.register_buffer(f"shuffle_{name}", permutation_matrix(nblocks, width).argmax(1), persistent=False)
        self.output_scale = nn.Parameter(torch.ones(linear.out_features))
        self.to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.linear.bias
        y = rotate(self.q_in, self.shuffle_in, x) @ self.linear.weight.mT
        y = rotate(self.q_out, self.shuffle_out, y) * self.output_scale.to(x.dtype)
        return y if bias is None else y + bias


def rotate(free: Any, shuffle: Any, x: Tensor) -> Tensor:
    """`Q x = Pᵀ L P R x` along the last dimension."""
    skew = free - free.mT
    identity = torch.eye(skew.shape[-1], device=skew.device)
    right, left = torch.linalg.solve(identity - skew, identity + skew, left=False).to(x.dtype)
    x = torch.einsum("...rj,rij->...ri", x.unflatten(-1, right.shape[:2]), right).flatten(-2)[..., shuffle]
    x = torch.einsum("...rj,rij->...ri", x.unflatten(-1, left.shape[:2]), left).flatten(-2)
    return x[..., torch.argsort(shuffle)]


class PublishedAdapter(nn.Module):
    """Puts `PublishedLinear` around the layers that every other method adapts; `remove` takes it away."""

    def __init__(self, config: AdapterConfig, unet: nn.Module, text_encoders: list[nn.Module]) -> None:
        super().__init__()
        linears = find_linears(find_attentions(unet), find_clip_attentions(bool(text_encoders), text_encoders))
        wrapped = {linear: PublishedLinear(linear, config) for linear in linears.values()}
        self.layers = nn.ModuleList(wrapped.values())
        self._places = [
            (module, name, child)
            for model in (unet, *text_encoders)
            for module in model.modules()
            for name, child in module.named_children()
            if child in wrapped
        ]
        for module, name, child in self._places:
            setattr(module, name, wrapped[child])

    def trainable(self) -> list[nn.Parameter]:
        names = ("q_in", "q_out", "output_scale")
        return [layer.get_parameter(name) for layer in self.layers for name in names]

    def remove(self) -> None:
        for module, name, child in self._places:
            setattr(module, name, child)
