"""What is wrong with the orthogonal convolutions as they were published, and what ours do there.

    python -m benchmarks.convolution_faults --out benchmarks/results/convolution_faults.json

Takes every layer of LipConvnet-15 with groups (4,–), narrower than the paper's, with random weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.measure import file_to_write, table
from benchmarks.orthogonal_convolutions import KINDS, shapes
from gsoft_diffusion.foundation.files import whole_file

COMPARED = ("(4,–) as published", "(4,–)")
SIDE = 4  # px of the pictures: what is measured does not depend on it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8, help="channels of the network's first stage")
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    records = [measure(kind, args.width) for kind in COMPARED]
    with whole_file(args.out) as file:
        file.write((json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())
    print(report(records))


def report(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each kind."""
    header = [
        "layers",
        "kernel numbers with a gradient of exactly 0",
        "inputs without effect, at stride 2",
        "singular values of fresh layers in evaluation mode",
    ]
    rows = []
    for record in records:
        low, high = record["fresh_singular_values"]
        row = [record["kind"], f"{record['dead_numbers']:.0%}", f"{record['dead_inputs_at_stride_2']:.0%}"]
        rows.append([*row, f"{low:.6f} to {high:.6g}"])
    return table(header, rows)


def measure(kind: str, width: int) -> dict[str, Any]:
    """Shares of numbers and inputs that are dead, and the singular values, over the layers of the network."""
    torch.manual_seed(0)
    dead = numbers = 0
    at_stride_2, values = [], []
    for inputs, outputs, kernel_size, stride, _ in shapes(15, width):
        layer = KINDS[kind](inputs, outputs, kernel_size, stride)
        if inputs <= 4 * width:  # the matrices of wider ones are large
            values.append(singular_values(layer.eval(), inputs))
        layer.train()
        its_dead, its_numbers = dead_numbers(layer, inputs)
        dead, numbers = dead + its_dead, numbers + its_numbers
        if stride == 2:
            at_stride_2.append(dead_inputs(layer, inputs))
    return {
        "kind": kind,
        "width": width,
        "dead_numbers": dead / numbers,
        "dead_inputs_at_stride_2": sum(at_stride_2) / len(at_stride_2),
        "fresh_singular_values": [min(float(v.min()) for v in values), max(float(v.max()) for v in values)],
    }


@torch.no_grad()
def singular_values(layer: nn.Module, inputs: int) -> torch.Tensor:
    """Of the layer's matrix for small pictures, in its present mode, as many as its shorter side has."""
    pictures = torch.eye(inputs * SIDE**2).unflatten(1, (inputs, SIDE, SIDE))
    return torch.linalg.svdvals((layer(pictures) - layer(torch.zeros_like(pictures[:1]))).flatten(1).double())


def dead_inputs(layer: nn.Module, inputs: int) -> float:
    """The share of input channels on which no output depends."""
    x = torch.randn(2, inputs, SIDE, SIDE, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
    return float((grad.abs().amax((0, 2, 3)) == 0).double().mean())


def dead_numbers(layer: nn.Module, inputs: int) -> tuple[int, int]:
    """How many of the kernels' numbers have a gradient of exactly 0, and how many numbers there are."""
    kernels = [parameter for name, parameter in layer.named_parameters() if name != "bias"]
    y = layer(torch.randn(4, inputs, SIDE, SIDE))
    grads = torch.autograd.grad((y * torch.randn(y.shape)).sum(), kernels)
    return sum(int((grad == 0).sum()) for grad in grads), sum(grad.numel() for grad in grads)


if __name__ == "__main__":
    main()
