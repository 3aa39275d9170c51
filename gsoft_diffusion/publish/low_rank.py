"""An adapter's change of the weights as a LoRA: the nearest of its rank, under the names that tools expect."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from gsoft.linear_slice import AnyLinear, LinearSlice
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.models.loading import best_device
from gsoft_diffusion.publish.approximation import Approximation
from gsoft_diffusion.publish.layer_names import matrix_path
from gsoft_diffusion.publish.tensor_files import rounded


@dataclass(frozen=True)
class LoraLayer(Approximation):
    """The factors `up (out, rank)` and `down (rank, in)` of one layer, and how near they come to the adapter."""

    up: Tensor
    down: Tensor

    def truncated(self, rank: int) -> LoraLayer:
        """The same at a smaller rank, without another decomposition.

        Its terms are orthogonal to each other and to what is lost already, so their squared norms add up.
        """
        dropped = self.up[:, rank:].float().norm(dim=0) * self.down[rank:].float().norm(dim=1)
        lost_norm = math.hypot(self.lost_norm, dropped.norm().item())
        return replace(self, up=self.up[:, :rank], down=self.down[:rank], lost_norm=lost_norm)


def lora_layers(stack: AdapterStack, strengths: Mapping[str, float], rank: int, dtype: torch.dtype) -> list[LoraLayer]:
    """The nearest LoRA, layer by layer, to the combined change by the adapters.

    stack: with no adapter in use. strengths: of the adapters to combine, by their names in the stack. rank: of each
    layer. dtype: of the factors.

    Raises UserError if a number is too large for it.
    """
    total = len(stack.layers(strengths))
    layers = tqdm(stack.composed(strengths), desc="singular values", unit="layer", total=total)
    device = best_device()  # where decompositions take least time
    return [approximate(name, weight.to(device), rotated.to(device), rank, dtype) for name, weight, rotated in layers]


def approximate(name: str, weight: Tensor, rotated: Tensor, rank: int, dtype: torch.dtype) -> LoraLayer:
    """The layer that takes `weight` W to about `rotated` W', with the errors that this leaves.

    name: the layer's, in the adapter.
    weight, rotated: `(out, in)`, float32, on the device that is to compute.
    rank: of the factors. dtype: of the factors; what rounding to it costs is in the errors.

    The factors are in main memory. Raises UserError if a number is too large for their dtype.
    """
    change = rotated - weight
    up, down = (rounded(name, factor, dtype) for factor in low_rank(change, rank))
    lost = change - up.float() @ down.float()
    weight_norm, change_norm, lost_norm = (matrix.norm().item() for matrix in (weight, change, lost))
    return LoraLayer(name, weight_norm, change_norm, lost_norm, up.cpu(), down.cpu())


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`up (out, rank)` and `down (rank, in)` whose product is as near to `change (out, in)` as the rank allows.

    By the truncated singular value decomposition `U_r S_r V_rᵀ` (Eckart and Young, 1936): what is lost,
    `‖change − up·down‖_F`, is the root of the sum of squares of the singular values left out. The values are shared
    evenly, `U_r √S_r` and `√S_r V_rᵀ`, so that both factors stay well within half precision. A rank above that of the
    matrix is filled up with zeros: diffusers reads kohya's alphas only if all layers have the same.
    """
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    missing = rank - len(root)
    return F.pad(up, (0, missing)), F.pad(down, (0, 0, 0, missing))


class Factors(NamedTuple):
    """`up (out, rank)` and `down (rank, in)` of one module."""

    up: Tensor
    down: Tensor


def by_module(layers: Sequence[LoraLayer], linears: Mapping[str, AnyLinear]) -> dict[str, Factors]:
    """The factors by the modules' paths in a diffusers pipeline, in the adapter's order.

    layers: of the LoRA. linears: the model's layers, by the same names. Slices of one matrix share factors of all of
    it, whose rank is the sum of theirs: zeros are where a slice is not.
    """
    modules: dict[str, Factors] = {}
    for layer in layers:
        linear, up, down = linears[layer.name], layer.up, layer.down
        path = matrix_path(layer.name, linear)
        if isinstance(linear, LinearSlice):
            size = (linear.whole.out_features, linear.whole.in_features)[linear.dim]
            around = (linear.start, size - linear.start - linear.length)
            up, down = (F.pad(up, (0, 0, *around)), down) if linear.dim == 0 else (up, F.pad(down, around))
        if path in modules:
            up, down = torch.cat([modules[path].up, up], dim=1), torch.cat([modules[path].down, down])
        modules[path] = Factors(up, down)
    return modules


def diffusers_tensors(modules: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The factors, by module, as diffusers' `save_lora_weights` names them; there, A is down and B is up."""
    tensors: dict[str, Tensor] = {}
    for path, factors in modules.items():
        tensors |= {f"{path}.lora_A.weight": factors.down, f"{path}.lora_B.weight": factors.up}
    return tensors


def kohya_tensors(modules: Mapping[str, Factors], place_of: Callable[[str], tuple[str, int]]) -> dict[str, Tensor]:
    """The factors as kohya's sd-scripts names them; tools multiply by alpha/rank, which is 1 here.

    Alphas are float32 whatever the factors are, for bfloat16 rounds numbers above 256.

    modules: the factors by module, in the adapter's order.
    place_of: what it calls a module of the diffusers pipeline, and how many rows are below it in a matrix that modules
    share.

    Modules of one name share such a matrix, from the top in the order of `modules`: their downs are stacked, and their
    ups are the blocks of a block-diagonal up, which therefore has the sum of their ranks.
    """
    shared: dict[tuple[str, int], list[Factors]] = defaultdict(list)
    for path, factors in modules.items():
        shared[place_of(path)].append(factors)
    tensors: dict[str, Tensor] = {}
    for (name, rows_below), parts in shared.items():
        down = torch.cat([part.down for part in parts])
        up = F.pad(torch.block_diag(*(part.up for part in parts)), (0, 0, 0, rows_below))
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return tensors
