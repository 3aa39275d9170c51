"""Skew-symmetric convolution kernels from free numbers, and a bound of their norm.

A kernel `L` of shape `(channels, channels, k, k)` is skew-symmetric if `L[o, i, t] = −L[i, o, −t]`, where `−t` is the
tap `t` mirrored at the middle. With zero padding the convolution's matrix is then skew-symmetric, for pictures of every
size (Singla and Feizi: Skew Orthogonal Convolutions, ICML 2021, arXiv 2105.11417).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsoft.blocks import free_numbers, skew_symmetric

SQUARINGS = 4  # of the Gram matrix: the bound is then at most m^(1/64) times the norm, 1.09 for m = 256


def kernel_numbers(size: int, kernel_size: int) -> int:
    """How many numbers decide the kernel of one group: half of its taps, and the middle one above its diagonal.

    size: the channels of the group. kernel_size: the side `k`, odd.
    """
    return kernel_size**2 // 2 * size**2 + free_numbers(size)


def skew_kernel(free: Tensor, size: int, kernel_size: int) -> Tensor:
    """The skew-symmetric kernel with these free numbers.

    free: `(groups, kernel_numbers(size, kernel_size))`. size: the channels of a group. kernel_size: the side `k`, odd.
    Returns `(groups, size, k², size)`: for each group the outputs, the taps, the inputs.

    The numbers are divided by √2. So the kernel's norm `‖L‖_F` is that of the numbers, and a step of gradient descent
    moves `L` as far as one on the whole `M` of `L = ½(M − Mᵀ)` does.
    """
    halves = kernel_size**2 // 2 * size**2
    first = free[:, :halves].unflatten(1, (size, -1, size)) if halves else free.new_empty(len(free), size, 0, size)
    middle = skew_symmetric(free[:, halves:], size).unsqueeze(2)
    last = first.transpose(1, 3).flip(2)
    return torch.cat([first, middle, -last], dim=2) / math.sqrt(2)


def norm_bound(kernel: Tensor) -> Tensor:
    """An upper bound of the norm of the convolution with a skew-symmetric kernel, for pictures of every size.

    kernel: `(groups, size, k², size)`, as `skew_kernel` gives it. Returns one bound for each group, `(groups,)`.

    The convolution's norm is at most `k` times that of the kernel as a matrix `T` of outputs by inputs and taps (Singla
    and Feizi: Fantastic Four, ICLR 2021, arXiv 1911.10258; of their four matrices, skew symmetry leaves two different
    norms). The norm of `T` is bounded by a Schatten norm, `‖T‖ ≤ tr((T Tᵀ)^q)^(1/2q)` with `q = 2^(SQUARINGS + 1)`
    (Gram iteration: Delattre et al., ICML 2023, arXiv 2305.16173). It depends on the kernel alone: nothing has to
    converge over the steps of a training. As gradient it has that of the norm, along its singular vectors.
    """
    matrices = kernel.flatten(2)
    with torch.no_grad():
        power = torch.bmm(matrices, matrices.mT)
        log_bound = torch.zeros_like(power[:, 0, 0])
        for index in range(SQUARINGS + 1):
            norm = torch.linalg.matrix_norm(power).clamp(min=torch.finfo(power.dtype).tiny)
            log_bound += norm.log() / 2 ** (index + 1)
            power = power / norm[:, None, None]
            if index < SQUARINGS:
                power = torch.bmm(power, power)
        largest = power.diagonal(dim1=1, dim2=2).argmax(1)
        left = power[torch.arange(len(power), device=power.device), :, largest].unsqueeze(2)
        left = torch.bmm(power, torch.bmm(power, left))  # nearly a multiple of the first left singular vector
        left = torch.nn.functional.normalize(left, dim=1)
        bound = math.isqrt(kernel.shape[2]) * log_bound.exp()
    norm = torch.linalg.vector_norm(torch.bmm(left.mT, matrices), dim=(1, 2))
    return bound * (norm / norm.detach().clamp(min=torch.finfo(norm.dtype).tiny) - 1) + bound
