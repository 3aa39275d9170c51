"""A training step of the orthogonal convolutions of LipConvnet-15, width 32, one layer at a time.

    python -m benchmarks.orthogonal_convolutions --out benchmarks/results/orthogonal_convolutions.json

Group-and-shuffle convolutions and SOC, and both as they were published, run forward and backward by turns: the n-th
times of all kinds were measured one right after the other. The table gives quartiles of the ratio with SOC, summed over
the network's layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import gsoft
from benchmarks.measure import CLOCKS, Records, file_to_write, quartiles, table
from benchmarks.published_convolutions import PublishedConv2d

Shape = tuple[int, int, int, int, int]  # inputs, outputs, kernel size, stride, side of the picture

GROUPS: dict[str, tuple[int, int | None]] = {"(4,–)": (4, None), "(4,1)": (4, 1), "(4,2)": (4, 2), "(4,4)": (4, 4)}


def _grouped(groups: tuple[int, int | None], inputs: int, outputs: int, kernel_size: int, stride: int) -> nn.Module:
    """GS-SOC. As in the paper's counts, only kernels larger than 1×1 have a second convolution."""
    return gsoft.GSConv2d(inputs, outputs, kernel_size, stride, groups=groups if kernel_size > 1 else (groups[0], None))


KINDS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "SOC": gsoft.SOCConv2d,
    **{name: partial(_grouped, groups) for name, groups in GROUPS.items()},
    "SOC as published": PublishedConv2d,
    "(4,–) as published": lambda inputs, outputs, kernel, stride: PublishedConv2d(
        inputs, outputs, kernel, stride, groups=(4, None)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=15, help="of the network, a multiple of 5")
    parser.add_argument("--width", type=int, default=32, help="channels of its first stage")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where other programs run at the same time")
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    records = Records(args.out, settings)
    missing = [shape for shape in dict.fromkeys(shapes(args.depth, args.width)) if not records.has(shape=list(shape))]
    for shape in tqdm(missing, unit="layer"):
        seconds = measure(shape, args.batch_size, args.repetitions, CLOCKS[args.clock])
        records.add(shape=list(shape), seconds=seconds)
    print(report(records.records, shapes(args.depth, args.width)))


def shapes(depth: int, width: int) -> list[Shape]:
    """The layers of LipConvnet after the first, which is SOC in every network, without its head."""
    found: list[Shape] = []
    channels, side = 3, 32
    for stage, index in product(range(5), range(depth // 5)):
        last = index == depth // 5 - 1
        outputs, kernel_size, stride = width * 2 ** (stage + last), 1 if last and stage == 4 else 3, 1 + last
        found.append((channels, outputs, kernel_size, stride, side))
        channels, side = outputs, side // stride
    return found[1:]


def measure(shape: Shape, batch_size: int, repetitions: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of forward and backward of a layer, of each kind."""
    inputs, outputs, kernel_size, stride, side = shape
    torch.manual_seed(0)
    layers = {name: make(inputs, outputs, kernel_size, stride) for name, make in KINDS.items()}
    x = torch.randn(batch_size, inputs, side, side, requires_grad=True)
    grad = torch.randn(batch_size, outputs, side // stride, side // stride)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for repetition in range(repetitions + 1):
        for name, layer in layers.items():
            started = clock()
            torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
            if repetition:  # the first is for warming up
                seconds[name].append(clock() - started)
    return seconds


def report(records: Sequence[dict[str, Any]], layers: Sequence[Shape]) -> str:
    """Markdown: what each kind takes for all layers, and how many times faster than SOC it is."""
    by_shape = {tuple(record["shape"]): record["seconds"] for record in records}
    sums = {
        name: [sum(step) for step in zip(*(by_shape[layer][name] for layer in layers), strict=True)] for name in KINDS
    }
    rows = []
    for name, seconds in sums.items():
        row = [name, f"{quartiles(seconds)[1]:.2f}"]
        for base in ("SOC", "SOC as published"):
            low, middle, high = quartiles([its / mine for its, mine in zip(sums[base], seconds, strict=True)])
            row.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    return table(["kind", "s", "speed-up over SOC", "speed-up over SOC as published"], rows)


if __name__ == "__main__":
    main()
