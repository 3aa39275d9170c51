"""What is learned for one linear layer: its shapes, how many numbers they are, and how strongly they act."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from gsoft.blocks import free_numbers
from gsoft.config import RotationConfig
from gsoft.errors import GSOFTError
from gsoft.group_and_shuffle import dense_factors, fit_blocks


class Rotation(nn.Module):
    """The learned numbers of one layer: GSOFT (paper, §6.1) or Double GSOFT (§6.2) with a scale per output.

        W' = s·Q_out W Q_in        with Q_out = I unless `config.double`, s = 1 unless `config.output_scale`

    q_in, q_out: free numbers of the skew-symmetric blocks, `(m, r, b(b−1)/2)`, 0 at the start; output_scale: `(out,)`,
    1 at the start. Parameters are float32 whatever the layer's dtype, and moving a parent with `.to(dtype)` or
    `.half()` does not change that: rounded to half precision, a rotation is no longer one.
    """

    q_in: nn.Parameter
    q_out: nn.Parameter | None
    output_scale: nn.Parameter | None

    def __init__(
        self,
        config: RotationConfig,
        in_features: int,
        out_features: int,
        *,
        layer: str = "linear layer",
        device: torch.device | None = None,
    ) -> None:
        """Makes the parameters, of which all rotations are identities.

        config: which there are, and their blocks. in_features, out_features: of the linear layer. layer: its name, for
        error messages. device: of the parameters. Raises GSOFTError if a width does not fit the configuration.
        """
        super().__init__()
        shapes = parameter_shapes(config, in_features, out_features, layer)
        for name in ("q_in", "q_out", "output_scale"):
            start = torch.ones if name == "output_scale" else torch.zeros
            value = start(shapes[name], dtype=torch.float32, device=device) if name in shapes else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.in_features, self.out_features = in_features, out_features
        self.layer = layer
        self.parametrization = config.parametrization

    @property
    def block_size_in(self) -> int:
        """Side `b` of the blocks of `Q_in`."""
        return self.in_features // self.q_in.shape[1]

    @property
    def block_size_out(self) -> int | None:
        """Side `b` of the blocks of `Q_out`, None without it."""
        return None if self.q_out is None else self.out_features // self.q_out.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether nothing has been learned: the rotations are identities, the scale is 1. False on the meta device."""
        if self.q_in.is_meta:
            return False
        rotations = (free for free in (self.q_in, self.q_out) if free is not None)
        return not any(free.any() for free in rotations) and (
            self.output_scale is None or bool((self.output_scale == 1).all())
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a parent to another device, but never to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def factor_shape(config: RotationConfig, width: int, layer: str) -> tuple[int, int, int]:
    """`(m, r, b)` of one rotation: factors, blocks in each, side of a block.

    config: gives `r` or `b`, and `m`, for "dense" the fewest that leave no zeros (paper, Theorem 2). width: the side
    `n` of the rotation. layer: whose it is, for the message. Raises GSOFTError if the width does not fit.
    """
    nblocks, size = fit_blocks(width, config.nblocks, config.block_size, layer)
    return (dense_factors(nblocks, size) if config.nfactors == "dense" else config.nfactors), nblocks, size


def parameter_shapes(
    config: RotationConfig, in_features: int, out_features: int, layer: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is learned for one linear layer.

    config: the settings. in_features, out_features: of the layer. layer: its name, for the message. `q_in` (and `q_out`
    if double) are `(m, r, b(b−1)/2)`, `output_scale` is `(out_features,)`. Raises GSOFTError naming the layer if a
    width does not fit.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, width in rotated_widths(config, in_features, out_features).items():
        nfactors, nblocks, size = factor_shape(config, width, f"{layer}.{name}")
        shapes[name] = (nfactors, nblocks, free_numbers(size))
    if config.output_scale:
        shapes["output_scale"] = (out_features,)
    return shapes


def parameter_count(config: RotationConfig, in_features: int, out_features: int) -> int:
    """How many numbers are learned for one linear layer, in closed form.

    config: the settings. in_features, out_features: of the layer. `m·n·(b−1)/2` for each rotated width `n = r·b`, and
    one for each output if there is a scale. Raises GSOFTError if a width does not fit.
    """
    count = out_features if config.output_scale else 0
    for width in rotated_widths(config, in_features, out_features).values():
        nfactors, _, size = factor_shape(config, width, "layer")
        count += nfactors * width * (size - 1) // 2
    return count


def forced_zeros(config: RotationConfig, in_features: int, out_features: int, layer: str) -> str | None:
    """Which `Q` of a layer is not dense, in words, and what would fill it (paper, Theorem 2); None if all are dense.

    config: the settings. in_features, out_features: of the layer. layer: its name, for the words. Raises GSOFTError if
    a width does not fit.
    """
    for name, width in rotated_widths(config, in_features, out_features).items():
        nfactors, nblocks, size = factor_shape(config, width, f"{layer}.{name}")
        if nfactors < (needed := dense_factors(nblocks, size)):
            return f"{layer}.{name} ({nfactors} factors of {nblocks} blocks of side {size}; {needed} factors fill it)"
    return None


def rotated_widths(config: RotationConfig, in_features: int, out_features: int) -> dict[str, int]:
    """The widths that are rotated, by the name of the rotation: `q_in`, and `q_out` with Double GSOFT (paper, §6.2).

    config: says whether it is double. in_features, out_features: of the linear layer.
    """
    return {"q_in": in_features, "q_out": out_features} if config.double else {"q_in": in_features}


def check_strength(strength: float, name: str = "adapter") -> None:
    """Raise GSOFTError unless a strength is a finite number. name: whose it is, for the message."""
    if not math.isfinite(strength):
        raise GSOFTError(f"{name}: its strength {strength} is not a number")


def at_strength(parameters: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """The parameters of an adapter, moved along the way from the base model (strength 0) to what was trained (1).

    parameters: by name, as in `Adapter.state_dict()`. strength: any finite number. Returns new tensors under the same
    names. Raises GSOFTError as `check_strength`.

    Skew-symmetric blocks are multiplied, `K → strength·K`, so that every rotation stays a rotation: a plane that turns
    by `2·atan(k)` with Cayley's map turns by `2·atan(strength·k)`, one that turns by `k` with the exponential by
    `strength·k`. Scales go straight, `1 + strength·(s − 1)`, which is defined whatever their sign. At 0 and 1 all is
    exact to the bit. Beyond 1 it goes on; below 0 it turns the other way.
    """
    check_strength(strength)
    return {
        name: torch.lerp(torch.ones_like(tensor), tensor, strength)
        if name.endswith("output_scale")
        else strength * tensor
        for name, tensor in parameters.items()
    }
