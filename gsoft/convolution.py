"""Orthogonal convolutions: group-and-shuffle convolutions (GS-SOC) and skew orthogonal convolutions (SOC).

    y = GrExpConv₂(ChShuffle₂(GrExpConv₁(ChShuffle₁(x))))        paper, §6.3

`GrExpConv` is the exponential of a grouped convolution with a skew-symmetric kernel, which is orthogonal. SOC (Singla
and Feizi, ICML 2021) is the case of one group and no shuffle.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsoft.autocast import without_autocast
from gsoft.errors import GSOFTError
from gsoft.exponential import check_series, coefficients, exponential_conv2d, exponential_kernel, truncation_error
from gsoft.shuffles import channel_shuffle
from gsoft.skew_kernels import kernel_numbers, norm_bound, skew_kernel

SMALLEST_NORM = 1e-12  # kernels that are smaller still are not scaled up to the radius: zeros stay zeros


class ExponentialConv2d(nn.Module):
    """`exp(L) ⋆ x` with zero padding, for a grouped skew-symmetric kernel `L` of bounded norm: an orthogonal map.

    `L` is made of the free numbers, and scaled so that the bound of its norm is `radius` (in each group). So it depends
    on the numbers alone: there is no state that has to follow them. In training mode the exponential's series has
    `train_terms` powers, in evaluation mode `eval_terms`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        groups: int,
        *,
        radius: float,
        train_terms: int,
        eval_terms: int,
        device: torch.device | None = None,
    ) -> None:
        """channels: of input and output, divisible by groups. kernel_size: odd. radius, terms: see `GSConv2d`."""
        super().__init__()
        for terms in (train_terms, eval_terms):
            check_series(radius, terms)
        self.channels, self.kernel_size, self.groups = channels, kernel_size, groups
        self.radius, self.train_terms, self.eval_terms = radius, train_terms, eval_terms
        size = channels // groups
        self.free = nn.Parameter(torch.empty(groups, kernel_numbers(size, kernel_size), device=device))
        nn.init.normal_(self.free, std=1 / math.sqrt(size))

    @property
    def terms(self) -> int:
        """The powers of the series in the present mode."""
        return self.train_terms if self.training else self.eval_terms

    def truncation_error(self) -> float:
        """How far from orthogonal the layer is at most in the present mode, see `gsoft.truncation_error`."""
        return truncation_error(self.radius, self.terms)

    def kernel(self) -> Tensor:
        """`L`, `(channels, channels/groups, k, k)`, in at least float32."""
        with without_autocast(self.free.device):
            free = self.free.to(torch.promote_types(self.free.dtype, torch.float32))
            skew = skew_kernel(free, self.channels // self.groups, self.kernel_size)
            bound = norm_bound(skew).clamp(min=SMALLEST_NORM)
            skew = skew * (self.radius / bound)[:, None, None, None]
        return skew.flatten(0, 1).unflatten(1, (self.kernel_size, self.kernel_size)).permute(0, 3, 1, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """x: `(B, channels, H, W)`, or without B; returns the same shape and dtype."""
        kernel, series = self.kernel(), coefficients(self.radius, self.terms)
        pixels = x.numel() // self.channels
        if self.kernel_size == 1 and self.channels // self.groups < pixels:  # this takes less arithmetic
            with without_autocast(x.device):
                kernel = exponential_kernel(kernel, self.groups, series)
            return F.conv2d(x, kernel.to(x.dtype), groups=self.groups)
        return exponential_conv2d(x, kernel.to(x.dtype), self.groups, series)

    def plain(self) -> nn.Module:
        """The layer as it is now, in evaluation mode, for inference: an `nn.Conv2d` if its kernel is 1×1."""
        series = coefficients(self.radius, self.eval_terms)
        with torch.no_grad():
            kernel = self.kernel()
            if self.kernel_size > 1:
                return FixedExponentialConv2d(kernel.to(self.free.dtype), self.groups, series)
            kernel = exponential_kernel(kernel, self.groups, series)
            return _fixed_conv2d(kernel.to(self.free.dtype), None, groups=self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, groups={self.groups}, radius={self.radius}, "
            f"train_terms={self.train_terms}, eval_terms={self.eval_terms}"
        )


class FixedExponentialConv2d(nn.Module):
    """`exp(L) ⋆ x` for a kernel that stays: a chain of plain convolutions and sums."""

    kernel: Tensor

    def __init__(self, kernel: Tensor, groups: int, series: tuple[float, ...]) -> None:
        """kernel: `L`, `(channels, channels/groups, k, k)`. groups: of it. series: `a_0 … a_terms`."""
        super().__init__()
        self.groups, self.series = groups, series
        self.register_buffer("kernel", kernel)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(B, channels, H, W)`, or without B; returns the same shape."""
        return exponential_conv2d(x, self.kernel, self.groups, self.series)


@dataclass(frozen=True)
class Layout:
    """How channels go into the exponentials of a group-and-shuffle convolution and come out of them.

    in_channels, out_channels, stride: of the layer. groups: `(a, b)`. paired_shuffle: see `channel_shuffle`.
    """

    in_channels: int
    out_channels: int
    stride: int
    groups: tuple[int, int | None]
    paired_shuffle: bool

    @property
    def unfolded(self) -> int:
        """The input's channels after space-to-depth."""
        return self.in_channels * self.stride**2

    @property
    def channels(self) -> int:
        """The channels inside of the layer."""
        return max(self.unfolded, self.out_channels)

    @property
    def last_groups(self) -> int:
        """The groups of the last exponential."""
        first, second = self.groups
        return first if second is None else second

    def check(self, name: str, kernel_size: int) -> None:
        """Raise GSOFTError unless shuffles can deal channels out, and each group keeps its part of them and can learn.

        name: of the layer, for the message. kernel_size: of the first exponential; a second has 1×1 kernels.
        """
        first, second = self.groups
        if min(self.in_channels, self.out_channels, self.stride, first, self.last_groups) < 1:
            raise GSOFTError(f"{name}: channels, stride and groups must be 1 or more")
        dealt = [("inputs" if self.stride == 1 else "inputs after space-to-depth", self.unfolded, first)]
        dealt += [] if second is None else [("channels", self.channels, second)]
        for what, channels, groups in dealt:
            in_pairs = self.paired_shuffle and groups > 1
            if channels % (2 * groups if in_pairs else groups):
                how = " in pairs" if in_pairs else ""
                raise GSOFTError(f"{name}: {channels} {what} cannot be dealt out{how} to {groups} groups")
        groups = first if self.out_channels > self.unfolded else self.last_groups
        if self.out_channels % groups:
            raise GSOFTError(f"{name}: {self.out_channels} outputs cannot be taken evenly from {groups} groups")
        pointwise = [second] if kernel_size > 1 else [first, second]
        if self.channels in pointwise:
            raise GSOFTError(f"{name}: a 1×1 kernel has nothing to learn in groups of one channel; take larger groups")


class GroupAndShuffle2d(nn.Module):
    """Convolutions that keep the number of channels, between shuffles, with any number of inputs and outputs."""

    def __init__(self, layout: Layout, spatial: nn.Module, pointwise: nn.Module | None, bias: Tensor | None) -> None:
        """layout: where channels go. spatial, pointwise: the two convolutions. bias: `(out_channels,)`."""
        super().__init__()
        self.layout, self.spatial, self.pointwise = layout, spatial, pointwise
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: `(B, in_channels, H, W)`, or without B, H and W divisible by the stride.

        Returns `(B, out_channels, H/stride, W/stride)`, or without B, in the dtype of x. Raises GSOFTError if x has
        another number of channels.
        """
        if x.shape[-3] != self.layout.in_channels:
            raise GSOFTError(f"pictures have {x.shape[-3]} channels, and the layer takes {self.layout.in_channels}")
        layout, first, last = self.layout, self.layout.groups[0], self.layout.last_groups
        x = channel_shuffle(F.pixel_unshuffle(x, layout.stride), first, layout.paired_shuffle)
        missing = layout.channels - layout.unfolded
        if missing:
            x = F.pad(x.unflatten(-3, (first, -1)), (0, 0, 0, 0, 0, missing // first)).flatten(-4, -3)
        x = self.spatial(x)
        if self.pointwise is not None:
            x = self.pointwise(channel_shuffle(x, last, layout.paired_shuffle))
        if layout.out_channels < layout.channels:
            x = x.unflatten(-3, (last, -1))[..., : layout.out_channels // last, :, :].flatten(-4, -3)
        return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]


class GSConv2d(GroupAndShuffle2d):
    """An orthogonal convolution in the place of `nn.Conv2d`: group-and-shuffle of exponentials (paper, §6.3).

    The matrix of the layer is orthogonal for pictures of every size. Where there are fewer outputs than inputs its rows
    are orthonormal, else its columns. Strides are taken by space-to-depth. Inside, the layer is `n` channels wide:
    `n = max(in_channels·stride², out_channels)`.

    Inputs are shuffled after space-to-depth. Zeros that fill them up to `n` channels are added to each group, and what
    is more than `out_channels` is cut off from each group. So every parameter and every input has an effect.
    """

    spatial: ExponentialConv2d
    pointwise: ExponentialConv2d | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | Literal["same"] = "same",
        groups: tuple[int, int | None] = (4, None),
        bias: bool = True,
        *,
        paired_shuffle: bool = True,
        radius: float | None = None,
        train_terms: int = 4,
        eval_terms: int = 9,
        device: torch.device | None = None,
    ) -> None:
        """Makes random free numbers, whose convolutions are orthogonal at once, and a bias of zeros.

        in_channels, out_channels: as in `nn.Conv2d`. kernel_size: odd. stride: divides the pictures' sides. padding:
        "same", or the number that means the same, `kernel_size // 2`. groups: `(a, b)`, of the convolution of
        kernel_size and of a 1×1 convolution after it; None for no second one. bias: whether one is added.
        paired_shuffle: whether shuffles keep the channels `2i` and `2i+1` together, which `MaxMin` compares. radius: of
        `L` in `exp(L)`, the bound of its norm, above 0, up to π; 2.1 by default, and for 1×1 kernels 1, as in SOC.
        train_terms, eval_terms: the powers of the exponential's series in training and evaluation mode. device: of the
        parameters.

        Raises GSOFTError if channels cannot be dealt out to the groups, or an argument is not one of these.
        """
        name = f"{type(self).__name__}({in_channels}, {out_channels}, kernel_size={kernel_size}, stride={stride})"
        if not all(isinstance(number, int) for number in (kernel_size, stride)):
            raise GSOFTError(f"{name}: kernel_size and stride must be one number each, the same for both sides")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise GSOFTError(f"{name}: kernel_size must be odd, or the kernel has no middle")
        if padding not in ("same", kernel_size // 2):
            raise GSOFTError(f"{name}: padding is {padding!r}; valid: 'same', which is {kernel_size // 2}")
        if not _is_pair(groups):
            raise GSOFTError(
                f"{name}: groups is {groups!r}, but must be a pair (a, b) or (a, None); with (4, None) there is one "
                "convolution, in 4 groups"
            )
        layout = Layout(in_channels, out_channels, stride, groups, paired_shuffle)
        layout.check(name, kernel_size)

        def exponential(kernel_size: int, groups: int) -> ExponentialConv2d:
            return ExponentialConv2d(
                layout.channels,
                kernel_size,
                groups,
                radius=(1.0 if kernel_size == 1 else 2.1) if radius is None else radius,
                train_terms=train_terms,
                eval_terms=eval_terms,
                device=device,
            )

        first, second = groups
        super().__init__(
            layout,
            exponential(kernel_size, first),
            None if second is None else exponential(1, second),
            torch.zeros(out_channels, device=device) if bias else None,
        )
        self.kernel_size = kernel_size

    def exponentials(self) -> list[ExponentialConv2d]:
        """The one or two convolutions that the layer is made of."""
        return [self.spatial] if self.pointwise is None else [self.spatial, self.pointwise]

    def lipschitz_bound(self) -> float:
        """An upper bound of the Lipschitz constant in the present mode: 1, and the error of cutting off the series."""
        return math.prod(1 + part.truncation_error() for part in self.exponentials())

    def plain(self) -> nn.Module:
        """The layer as it is now, in evaluation mode, for inference: its kernels fixed, its series cut off by then.

        One `nn.Conv2d` if kernels are 1×1. Else a chain of plain convolutions, since the exponential's kernel would
        have to change at the borders.
        """
        bias = None if self.bias is None else self.bias.detach().clone()
        if self.kernel_size == 1:
            return _fixed_conv2d(self._matrix(), bias, stride=self.layout.stride)
        pointwise = None if self.pointwise is None else self.pointwise.plain()
        return GroupAndShuffle2d(self.layout, self.spatial.plain(), pointwise, bias).eval().requires_grad_(False)

    @torch.no_grad()
    def _matrix(self) -> Tensor:
        """What 1×1 kernels, shuffles and space-to-depth are together: a kernel as large as the stride."""
        layer = copy.deepcopy(self).cpu().double().eval()
        layer.bias = None
        patch = self.layout.in_channels, self.layout.stride, self.layout.stride
        outputs = layer(torch.eye(self.layout.unfolded, dtype=torch.float64, device="cpu").unflatten(1, patch))
        return outputs.flatten(1).mT.unflatten(1, patch).contiguous().to(self.spatial.free)

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"{layout.in_channels}, {layout.out_channels}, kernel_size={self.kernel_size}, stride={layout.stride}, "
            f"groups={layout.groups}, bias={self.bias is not None}, paired_shuffle={layout.paired_shuffle}"
        )


class SOCConv2d(GSConv2d):
    """Skew orthogonal convolution (Singla and Feizi, ICML 2021): one group, nothing shuffled."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | Literal["same"] = "same",
        bias: bool = True,
        *,
        radius: float | None = None,
        train_terms: int = 4,
        eval_terms: int = 9,
        device: torch.device | None = None,
    ) -> None:
        """The arguments are those of `GSConv2d`."""
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            (1, None),
            bias,
            radius=radius,
            train_terms=train_terms,
            eval_terms=eval_terms,
            device=device,
        )


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model for inference, in which orthogonal convolutions are plain ones with fixed kernels.

    model: any module. Returns a copy in evaluation mode whose parameters need no gradient. It computes what the model
    computes in evaluation mode, without making the kernels each time.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(copied, GSConv2d):
        return copied.plain()
    plain: dict[nn.Module, nn.Module] = {}  # a layer that the model holds in several places stays one
    for path, module in list(copied.named_modules(remove_duplicate=False)):
        if isinstance(module, GSConv2d):
            parent, _, name = path.rpartition(".")
            plain[module] = plain.get(module) or module.plain()
            setattr(copied.get_submodule(parent), name, plain[module])
    return copied


def _is_pair(groups: object) -> bool:
    """Whether these are the groups of two convolutions, of which there may not be the second."""
    if not isinstance(groups, tuple | list) or len(groups) != 2:
        return False
    first, second = groups
    return isinstance(first, int) and (second is None or isinstance(second, int))


def _fixed_conv2d(kernel: Tensor, bias: Tensor | None, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A plain convolution with this kernel `(out, in/groups, k, k)` and bias `(out,)`."""
    outputs, inputs, side, _ = kernel.shape
    layer = nn.Conv2d(inputs * groups, outputs, side, stride, groups=groups, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(kernel, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
