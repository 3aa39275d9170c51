"""One rotated linear layer: `y = s·(Q_out W Q_in x) + bias` around a frozen `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.group_and_shuffle import dense_factors, fit_blocks, rotate, rotate_back
from gsoft_diffusion.orthogonal import free_numbers
from gsoft_diffusion.rotated_linear import rotate_activations, rotate_weights
from gsoft_diffusion.rotation_group import RotationGroup


def factor_shape(config: AdapterConfig, width: int, layer: str) -> tuple[int, int, int]:
    """`(m, r, b)` of the rotation of this width: factors, blocks in each, side of a block. UserError if none fits."""
    nblocks, size = fit_blocks(width, config.nblocks, config.block_size, layer)
    return (dense_factors(nblocks, size) if config.nfactors == "dense" else config.nfactors), nblocks, size


def parameter_shapes(
    config: AdapterConfig, in_features: int, out_features: int, layer: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is learned for one linear layer.

    `q_in` (and `q_out` if double) are `(m, r, b(b−1)/2)`, `output_scale` is `(out_features,)`. Raises UserError naming
    the layer if a width does not fit.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, width in {"q_in": in_features, "q_out": out_features}.items():
        if name == "q_in" or config.double:
            nfactors, nblocks, size = factor_shape(config, width, f"{layer}.{name}")
            shapes[name] = (nfactors, nblocks, free_numbers(size))
    if config.output_scale:
        shapes["output_scale"] = (out_features,)
    return shapes


def parameter_count(config: AdapterConfig, in_features: int, out_features: int) -> int:
    """How many numbers are learned for one linear layer, in closed form.

    `m·n·(b−1)/2` for each rotated width `n = r·b`, and one for each output if there is a scale.
    """
    count = out_features if config.output_scale else 0
    for width in (in_features, out_features) if config.double else (in_features,):
        nfactors, _, size = factor_shape(config, width, "layer")
        count += nfactors * width * (size - 1) // 2
    return count


class GSOFTProjection(nn.Module):
    """What is learned for one linear layer: GSOFT (paper, §6.1) or Double GSOFT (§6.2) with a scale per output.

        y = s·(Q_out W Q_in x) + bias        with Q_out = I unless `config.double`, s = 1 unless `config.output_scale`

    The frozen layer itself belongs to the base model and is passed to every call. Parameters are float32 whatever the
    base model's dtype, and moving a parent with `.to(dtype)` or `.half()` does not change that. At the start the output
    is bit-equal to the plain layer's: identity rotations reproduce `W` exactly (on a GPU, as long as TF32 is left off).
    """

    q_in: nn.Parameter
    q_out: nn.Parameter | None
    output_scale: nn.Parameter | None

    def __init__(
        self,
        config: AdapterConfig,
        in_features: int,
        out_features: int,
        *,
        layer: str = "linear layer",
        device: torch.device | None = None,
    ) -> None:
        """layer: the name for error messages. Raises UserError if a width does not fit the configuration."""
        super().__init__()
        shapes = parameter_shapes(config, in_features, out_features, layer)
        for name in ("q_in", "q_out", "output_scale"):
            start = torch.ones if name == "output_scale" else torch.zeros
            value = start(shapes[name], dtype=torch.float32, device=device) if name in shapes else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.in_features, self.out_features = in_features, out_features
        self.layer = layer
        self.parametrization = config.parametrization
        self.enabled = True
        self._base_weight: Tensor | None = None  # the exact W while W' is in its place
        self.join(RotationGroup([self]), 0)

    def join(self, group: RotationGroup, index: int) -> None:
        """Have the rotations made together with those of a group's other projections, as its `index`-th."""
        self._group, self._index = group, index

    @torch.compiler.disable
    def forward(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """x: `(…, in_features)`; returns `(…, out_features)` in the dtype the plain layer would give.

        Without gradients the rotated weight is used, which is kept: sampling costs what the base model costs. In
        training the weight or the activations are rotated, whichever is cheaper for these shapes.
        """
        if not self.active:
            return linear(x)
        self._check(linear)
        if self._rotates_activations(linear, x):
            return _rotated([self], [linear], x)[0]
        return F.linear(x, self._group.weight(self._index, linear.weight), linear.bias)

    @property
    def neutral(self) -> bool:
        """Whether nothing has been learned: the rotations are identities, the scale is 1."""
        rotations = (free for free in (self.q_in, self.q_out) if free is not None)
        return not any(free.any() for free in rotations) and (
            self.output_scale is None or bool((self.output_scale == 1).all())
        )

    @property
    def active(self) -> bool:
        """False where the plain layer is right as it is: switched off, or merged into its weight."""
        return self.enabled and not self.merged

    def _check(self, linear: nn.Linear) -> None:
        if not isinstance(linear, nn.Linear):
            raise UserError(
                f"{self.layer}: another adapter sits on this layer; merge the GSOFT adapter before adding it"
            )
        if linear.weight.device != self.q_in.device:
            raise UserError(
                f"{self.layer}: the adapter is on {self.q_in.device}, the model on {linear.weight.device}; "
                f'move both, for example adapter.to("{linear.weight.device}")'
            )

    def _rotates_activations(self, linear: nn.Linear, x: Tensor) -> bool:
        """autocast decides by itself what is computed in which precision; it is left to do so in one plain product."""
        if not (torch.is_grad_enabled() and self.q_in.requires_grad) or torch.is_autocast_enabled(x.device.type):
            return False
        return not self._group.weight_side(x.numel() // self.in_features, linear.weight)

    def rotated_weight(self, weight: Tensor) -> Tensor:
        """`W' = s·Q_out W Q_in`, computed in float32 (float64 for a float64 weight), in the dtype of W `(out, in)`."""
        return rotate_weights([weight.detach()], [self._group.rotation(self._index)])[0]

    def rotations(self) -> tuple[Tensor, Tensor | None]:
        """The orthogonal blocks `(m, r, b, b)` of `Q_in` and `Q_out`, float32."""
        rotation = self._group.rotation(self._index)
        return rotation.right, rotation.left

    @property
    def merged(self) -> bool:
        return self._base_weight is not None

    @torch.no_grad()
    def merge(self, linear: nn.Linear) -> None:
        """Write `W'` into the layer and keep the exact `W`; from then on the layer alone does everything."""
        if self._base_weight is None:
            self._check(linear)
            merged = self._group.weight(self._index, linear.weight)
            self._group.drop_weight(self._index)
            self._base_weight = linear.weight.detach().clone()
            linear.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self, linear: nn.Linear) -> None:
        """Put `W` back, bit for bit."""
        if self._base_weight is not None:
            linear.weight.copy_(self._base_weight)
            self._base_weight = None

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """Largest entry of `|QᵀQ − I|` over this layer's rotations."""
        errors = []
        for blocks in self.rotations():
            if blocks is not None:
                identity = torch.eye(blocks.shape[1] * blocks.shape[2], device=blocks.device)
                errors.append((rotate_back(blocks, rotate(blocks, identity)) - identity).abs().max().item())
        return max(errors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a parent to another device, but never to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


@torch.compiler.disable
def project(projections: Sequence[GSOFTProjection], linears: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """What each of several projections makes of the same x; equal-shaped ones that rotate it do so together."""
    first, layer = projections[0], linears[0]
    alike = all(p._group is first._group and p.active for p in projections)
    if alike:
        for projection, linear in zip(projections, linears, strict=True):
            projection._check(linear)
    if not (alike and first._rotates_activations(layer, x)):
        return [projection(linear, x) for projection, linear in zip(projections, linears, strict=True)]
    return _rotated(projections, linears, x)


def _rotated(projections: Sequence[GSOFTProjection], linears: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """By rotating x and the results."""
    group = projections[0]._group
    rotations = [group.rotation(projection._index, x.dtype) for projection in projections]
    layers = [(linear.weight, linear.bias) for linear in linears]
    return list(rotate_activations(x, layers, rotations, group.neutral))


class GSOFTLinear(nn.Linear):
    """Stands in for an `nn.Linear` and rotates it: for models that have no attention processors.

    It shares the layer's own weight and bias, and the projection is not a submodule: to everything else, state dicts
    and saving included, the model looks as before.
    """

    projection: GSOFTProjection
    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Linear, projection: GSOFTProjection) -> None:
        nn.Module.__init__(self)  # not Linear's: it would allocate weights that are thrown away
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.weight, self.bias = base_layer.weight, base_layer.bias
        object.__setattr__(self, "projection", projection)
        object.__setattr__(self, "base_layer", base_layer)

    def forward(self, input: Tensor) -> Tensor:
        return self.projection(self, input) if self.projection.active else super().forward(input)

    def unwrapped(self) -> nn.Linear:
        """The layer that was wrapped, with whatever has become of its weight and bias."""
        self.base_layer.weight, self.base_layer.bias = self.weight, self.bias
        return self.base_layer


def at_strength(parameters: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """The parameters of an adapter, moved along the way from the base model (strength 0) to what was trained (1).

    Skew-symmetric blocks are multiplied, `K → strength·K`, so that every rotation stays a rotation: a plane that turns
    by `2·atan(k)` with Cayley's map turns by `2·atan(strength·k)`, one that turns by `k` with the exponential by
    `strength·k`. Scales go straight, `1 + strength·(s − 1)`, which is defined whatever their sign. At 0 and 1 all is
    exact to the bit. Beyond 1 it goes on; below 0 it turns the other way.
    """
    return {
        name: torch.lerp(torch.ones_like(tensor), tensor, strength)
        if name.endswith("output_scale")
        else strength * tensor
        for name, tensor in parameters.items()
    }
