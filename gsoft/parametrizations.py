"""Orthogonal weights without a base model: a parametrization of any module's matrix, and a layer of its own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gsoft.autocast import without_autocast
from gsoft.blocks import free_numbers, orthogonal_blocks
from gsoft.config import Parametrization, RotationConfig
from gsoft.errors import GSOFTError
from gsoft.group_and_shuffle import rotate
from gsoft.rotation import factor_shape


def orthogonal(
    module: nn.Module,
    name: str = "weight",
    *,
    nblocks: int | None = None,
    block_size: int | None = None,
    nfactors: int | Literal["dense"] = "dense",
    parametrization: Parametrization = "cayley",
) -> nn.Module:
    """Keep a matrix of a module orthogonal, whatever the optimizer does, as a group-and-shuffle matrix (paper, §5).

    In the manner of `torch.nn.utils.parametrizations.orthogonal`: afterwards `module.weight` is computed, and what is
    learned are `module.parametrizations.weight.original`, the free numbers `(m, r, b(b−1)/2)`, 0 at the start. Of a
    matrix `(out, in)` that is not square, the shorter side's vectors are orthonormal: the weight is `W₀ Qᵀ` or, if
    `out > in`, `Q W₀`, where `W₀` is the orthogonal factor of the weight as it was (by QR). So the weight starts as
    `W₀`, and assigning to it chooses a new `W₀`.

    module, name: the matrix is the module's parameter of this name. nblocks, block_size, nfactors, parametrization: of
    `Q`, whose width is the longer side; see `RotationConfig`. Returns the module. Raises GSOFTError if the parameter is
    not a matrix or its width does not fit.
    """
    weight = getattr(module, name, None)
    layer = f"{type(module).__name__}.{name}"
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        what = f"has the shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "is no tensor"
        raise GSOFTError(f"{layer} {what}: only a matrix of floating-point numbers can be orthogonal")
    shape = factor_shape(_config(nblocks, block_size, nfactors, parametrization), max(weight.shape), layer)
    parametrize.register_parametrization(module, name, _Orthogonal(shape, parametrization, weight))
    return module


class _Orthogonal(nn.Module):
    """Makes the weight from the free numbers; `base` is `W₀` with orthonormal columns, `(longer, shorter side)`."""

    base: Tensor

    def __init__(self, shape: tuple[int, int, int], parametrization: Parametrization, weight: Tensor) -> None:
        super().__init__()
        self._shape, self._parametrization = shape, parametrization
        self._wide = weight.shape[0] < weight.shape[1]
        self.register_buffer("base", torch.empty_like(weight.mT if self._wide else weight))

    def forward(self, free: Tensor) -> Tensor:
        """free: `(m, r, b(b−1)/2)`; returns the weight, in the dtype of `W₀`."""
        _, _, size = self._shape
        (blocks,) = orthogonal_blocks([free], size, self._parametrization)
        with without_autocast(blocks.device):  # rounded to half precision it is no longer orthogonal
            rotated = rotate(blocks, self.base.to(blocks.dtype)).to(self.base.dtype)
        return rotated.mT if self._wide else rotated

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take the orthogonal factor of the weight as `W₀`; returns the free numbers that go with it."""
        tall = (weight.mT if self._wide else weight).detach()
        q, r = torch.linalg.qr(tall.to(torch.promote_types(tall.dtype, torch.float32)))
        signs = r.diagonal().sgn()
        self.base.copy_(q * torch.where(signs == 0, 1, signs))  # which makes it the weight itself, if orthogonal
        nfactors, nblocks, size = self._shape
        return weight.new_zeros(nfactors, nblocks, free_numbers(size))


class OrthogonalLinear(nn.Module):
    """A linear layer whose matrix is orthogonal: `y = Q x + bias`, the identity at the start.

    No matrix of the layer's size is made: `Q x` costs `m·b·n` multiply-adds for each vector. Where the widths differ,
    x is filled up with zeros, or the last outputs are left out: `Q` then has orthonormal columns, or rows.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        nblocks: int | None = None,
        block_size: int | None = None,
        nfactors: int | Literal["dense"] = "dense",
        parametrization: Parametrization = "cayley",
        device: torch.device | None = None,
    ) -> None:
        """Makes the free numbers, of which `Q` is the identity, and a bias of zeros.

        in_features, out_features: the widths, equal by default. bias: whether one is added. nblocks, block_size,
        nfactors, parametrization: of `Q`, whose width is the larger of the two; see `RotationConfig`. device: of the
        parameters. Raises GSOFTError if the width does not fit.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        config = _config(nblocks, block_size, nfactors, parametrization)
        width = max(self.in_features, self.out_features)
        nfactors_, nblocks_, self.block_size = factor_shape(config, width, "OrthogonalLinear")
        self.parametrization = parametrization
        self.free = nn.Parameter(torch.zeros(nfactors_, nblocks_, free_numbers(self.block_size), device=device))
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: `(…, in_features)`; returns `(…, out_features)` in the same dtype."""
        (blocks,) = orthogonal_blocks([self.free], self.block_size, self.parametrization)
        columns = x.reshape(-1, self.in_features).mT
        columns = nn.functional.pad(columns, (0, 0, 0, max(0, self.out_features - self.in_features)))
        y = rotate(blocks.to(x.dtype), columns)[: self.out_features].mT
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """An upper bound of the Lipschitz constant: the norms of `Q`'s factors multiplied, which is 1 but for rounding.

        The norm of a factor is the largest of its blocks' norms.
        """
        (blocks,) = orthogonal_blocks([self.free], self.block_size, self.parametrization)
        return float(torch.linalg.matrix_norm(blocks.double(), ord=2).amax(1).prod())

    def extra_repr(self) -> str:
        nfactors, nblocks, _ = self.free.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nfactors={nfactors}, nblocks={nblocks}, block_size={self.block_size}"
        )


def _config(
    nblocks: int | None, block_size: int | None, nfactors: int | Literal["dense"], parametrization: Parametrization
) -> RotationConfig:
    return RotationConfig(
        nblocks=nblocks,
        block_size=block_size,
        nfactors=nfactors,
        double=False,
        parametrization=parametrization,
        output_scale=False,
    )
