"""LipConvnet (Singla and Feizi, ICML 2021), of skew orthogonal or of group-and-shuffle convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gsoft
from gsoft_diffusion.foundation.errors import UserError

STAGES = 5  # each halves the picture's sides, so 32 px become 1
PICTURE_SIZE = 2**STAGES  # px


@dataclass(frozen=True)
class Convolutions:
    """Which convolutions a network is made of.

    groups: `(a, b)` of `gsoft.GSConv2d`, None for SOC. paired: whether shuffles keep pairs of channels together; always
      True for SOC, which shuffles nothing.
    """

    groups: tuple[int, int | None] | None = None
    paired: bool = True

    def __post_init__(self) -> None:
        if self.groups is None:
            object.__setattr__(self, "paired", True)

    @property
    def name(self) -> str:
        """What tables call it, such as `(4,–) not paired`."""
        if self.groups is None:
            return "SOC"
        first, second = self.groups
        return f"({first},{second or '–'}){'' if self.paired else ' not paired'}"

    @property
    def slug(self) -> str:
        """What files call it, such as `4-none-not-paired`."""
        if self.groups is None:
            return "soc"
        first, second = self.groups
        return f"{first}-{second or 'none'}{'' if self.paired else '-not-paired'}"


class Normalized(nn.Module):
    """Shift the colours by their means and divide all by one number, the Lipschitz constant's inverse."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        """mean: `(3,)`. scale: one number."""
        super().__init__()
        self.register_buffer("mean", mean.reshape(-1, 1, 1).clone())
        self.register_buffer("scale", scale.clone())

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: `(B, 3, H, W)` in [0, 1]; returns the same shape."""
        return (pictures - self.mean) / self.scale

    def lipschitz_bound(self) -> float:
        """How much further apart two pictures are afterwards: `1/scale`."""
        return 1 / float(self.scale)


class LipConvnet(nn.Sequential):
    """Pictures `(B, 3, 32, 32)` in [0, 1] to logits `(B, classes)`.

    Only the first layer, `Normalized`, moves two inputs further apart, by the factor `1/scale`: a certificate divides
    by it.

    Five stages of `depth/5` convolutions with `MaxMin`; the last convolution of a stage has stride 2 and doubles the
    width. It has a 1×1 kernel in the last stage, the others 3×3. A last 1×1 skew orthogonal convolution gives the
    logits. As in the paper's counts, second convolutions of the pair `(a, b)` follow 3×3 kernels only. The very first
    convolution is skew orthogonal in every network: three colours cannot be dealt out to four groups.
    """

    def __init__(
        self, depth: int, width: int, classes: int, convolutions: Convolutions, mean: Tensor, scale: Tensor
    ) -> None:
        """depth: convolutions without the last, a multiple of 5. width: channels of the first stage. classes: of the
        logits. convolutions: what the layers are. mean, scale: of the colours, see `Normalized`.

        Raises UserError if the depth is no multiple of 5, or the width does not fit the groups.
        """
        if depth < STAGES or depth % STAGES:
            raise UserError(f"--depth {depth} is not a multiple of {STAGES}, the stages of the network")
        layers: list[nn.Module] = [Normalized(mean, scale)]
        channels = 3
        for stage in range(STAGES):
            for index in range(depth // STAGES):
                last = index == depth // STAGES - 1
                outputs = width * 2 ** (stage + last)
                kernel_size = 1 if last and stage == STAGES - 1 else 3
                stride = 2 if last else 1
                layers += [_convolution(channels, outputs, kernel_size, stride, convolutions), gsoft.MaxMin()]
                channels = outputs
        super().__init__(*layers, gsoft.SOCConv2d(channels, classes, 1), nn.Flatten())

    def orthogonal_layers(self) -> list[gsoft.GSConv2d]:
        """The convolutions, SOC among them."""
        return [layer for layer in self if isinstance(layer, gsoft.GSConv2d)]


def check_fits(depth: int, width: int, convolutions: Convolutions) -> None:
    """Raise UserError as `LipConvnet` does, without making one: before pictures are drawn."""
    with torch.device("meta"):
        LipConvnet(depth, width, 2, convolutions, torch.zeros(3), torch.ones(()))


def _convolution(inputs: int, outputs: int, kernel_size: int, stride: int, convolutions: Convolutions) -> nn.Module:
    if convolutions.groups is None or inputs == 3:
        return gsoft.SOCConv2d(inputs, outputs, kernel_size, stride)
    first, second = convolutions.groups
    groups = first, second if kernel_size > 1 else None
    try:
        return gsoft.GSConv2d(inputs, outputs, kernel_size, stride, groups=groups, paired_shuffle=convolutions.paired)
    except gsoft.GSOFTError as error:
        raise UserError(f"--width or --groups does not fit: {error}") from None
