"""What the two sides of a rotated layer cost on a device, and so which one a training step takes.

A step's cost is counted in three things, as in `docs/performance.md`: operations that are started, bytes that go
through memory, and multiply-adds of the products with the weight.

    weight's side:       T·out·in multiply-adds for the gradient by W', and W's entries through all block products
    activations' side:   the T·(in + out) entries of input and output through all block products

`T` is the number of tokens, and each entry that is read or written by an operation counts with its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

# Counted in the operations of `gsoft.products`, with two factors on both sides of the weight.
WEIGHT_LAUNCHES, ACTIVATION_LAUNCHES = 60, 40  # operations of a forward and a backward pass
WEIGHT_BYTES = 220  # through memory for each entry of a weight, which is rotated in float32
ACTIVATION_ACCESSES = 28  # reads and writes of each entry of an input and of an output, in the layer's dtype

# All rotated weights of an adapter that are kept from the forward to the backward pass take no more than this. Layers
# beyond it rotate their activations, so that a large model does not hold a second copy of its attention.
KEPT_WEIGHT_BYTES = 2 * 2**30


class DeviceCosts(NamedTuple):
    """Seconds of a device, and how many entries of weights it best rotates in one call.

    launch: seconds to start one operation. bandwidth: bytes of memory a second. madds: multiply-adds a second in half
    precision. entries_at_once: entries of the weights that are rotated in one call; more take more memory on the way.
    doubt: how many times cheaper the activations' side has to look before it is taken. Where costs are not measured,
    the weight's side has the benefit: it starts the fewest operations.
    """

    launch: float
    bandwidth: float
    madds: float
    entries_at_once: int
    doubt: float


# Fitted by `python -m benchmarks.sides` to the measured steps in benchmarks/results/sides.json. More entries than a
# core's cache holds are slower on a CPU.
CPU = DeviceCosts(launch=3.3e-5, bandwidth=1.3e10, madds=2.6e11, entries_at_once=2**18, doubt=1)
# Not measured: an H100's data sheet (3.35 TB/s, 990 TFLOPS in bfloat16), of which three quarters and a half are taken
# as reached, and 10 microseconds of PyTorch for each operation.
GPU = DeviceCosts(launch=1e-5, bandwidth=2.5e12, madds=2.5e14, entries_at_once=2**26, doubt=2)


_assumed: ContextVar[torch.device | None] = ContextVar("device that costs are assumed for", default=None)


@contextmanager
def assumed(device: torch.device) -> Iterator[None]:
    """Inside the block layers choose their side as on this device, wherever their tensors are. device: any."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def device_costs(device: torch.device) -> DeviceCosts:
    """The costs that are assumed for a device: those of a CPU, or of a GPU."""
    return CPU if (_assumed.get() or device).type == "cpu" else GPU


def weights_at_once(weight: Tensor) -> int:
    """How many weights of this shape are rotated in one call on their device. weight: `(out, in)`."""
    return max(1, device_costs(weight.device).entries_at_once // weight.numel())


def weight_side_is_cheaper(tokens: int, weight: Tensor, together: int = 1) -> bool:
    """Whether a training step is expected to cost less with the weight rotated than with the activations.

    tokens: how many vectors go through the layer. weight: `(out, in)`, of which shape, dtype and device count.
    together: how many weights share the operations of a call.
    """
    costs, half = device_costs(weight.device), 2
    size = weight.element_size()
    by_weight = (
        (WEIGHT_LAUNCHES / together) * costs.launch
        + weight.numel() * WEIGHT_BYTES / costs.bandwidth
        + tokens * weight.numel() * (size / half) / costs.madds
    )
    by_activations = (
        ACTIVATION_LAUNCHES * costs.launch + tokens * sum(weight.shape) * ACTIVATION_ACCESSES * size / costs.bandwidth
    )
    return by_weight <= costs.doubt * by_activations
