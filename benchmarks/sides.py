"""Which side to rotate: one projection's training step with the weight rotated and with the activations rotated.

python -m benchmarks.sides --out benchmarks/results/sides.json --plot docs/images/sides.png

Sweeps width, block size and tokens (of the whole batch: only their product with the batch counts). Each point is the
smallest of several interleaved measurements of a Double GSOFT projection, forward and backward, without the Cayley map,
which is the same for both. From all points follow the constants of `gsoft.costs` for the device, which are printed:
`--device cuda` measures those of a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.bases import CPU, DTYPES, device
from benchmarks.measure import CLOCKS, Records, clock_for, file_to_write
from gsoft.costs import ACTIVATION_ACCESSES, ACTIVATION_LAUNCHES, WEIGHT_BYTES, WEIGHT_LAUNCHES, weight_side_is_cheaper
from gsoft.products import RotationBlocks, rotate_activations, rotate_weights

matplotlib.use("agg")
from matplotlib import pyplot as plt

from gsoft_diffusion.config.command_line import expanded_path

WIDTHS = (320, 640, 1280)
BLOCK_SIZES = (5, 10, 20, 40)
TOKENS = (64, 256, 1024, 4096)
NUMBERS = ("width", "tokens", "frozen", "weight", "activations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--device", type=device, default=CPU)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, help="cpu where other programs run at the same time")
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    parser.add_argument("--plot", type=expanded_path, help="PNG to draw")
    args = parser.parse_args()
    args.clock = args.clock or clock_for(args.device)
    records = Records(args.out, {"clock": args.clock}, args.device)
    points = [
        {"dtype": dtype, "width": width, "block_size": size, "tokens": tokens}
        for dtype, width, size, tokens in product(args.dtypes, WIDTHS, BLOCK_SIZES, TOKENS)
        if width % size == 0
    ]
    for point in tqdm([point for point in points if not records.has(**point)], unit="point"):
        found = measure(**point, repetitions=args.repetitions, clock=CLOCKS[args.clock], on=args.device)
        records.add(**point, **found)
    for record in records.records:
        record["predicted"] = "weight" if _predicted(record, args.device) else "activations"
    agree = [r for r in records.records if r[r["predicted"]] == min(r["weight"], r["activations"])]
    lost = [r[r["predicted"]] / min(r["weight"], r["activations"]) - 1 for r in records.records]
    print(
        f"{len(records.records)} points; the rule takes the faster side in {len(agree)}, "
        f"and loses {100 * sum(lost) / len(lost):.1f}% on average, {100 * max(lost):.0f}% at worst"
    )
    launch, bandwidth, madds = fit(records.records)
    print(f"fitted to them: launch={launch:.2g}, bandwidth={bandwidth:.2g}, madds={madds:.2g}")
    if args.plot:
        plot(records.records, args.plot)


def measure(
    dtype: str, width: int, block_size: int, tokens: int, repetitions: int, clock: Callable[[], float], on: torch.device
) -> dict[str, float]:
    """Seconds of forward and backward: the plain frozen layer, and each side."""
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    x = torch.randn(tokens, width).to(on, kind).requires_grad_()
    weight, grad = torch.randn(width, width).to(on, kind), torch.randn(tokens, width).to(on, kind)
    q_in, q_out = (
        torch.linalg.qr(torch.randn(2, width // block_size, block_size, block_size))[0].to(on).requires_grad_()
        for _ in range(2)
    )

    rotation = RotationBlocks(q_in, q_out, None)

    def on_weight() -> None:
        (rotated,) = rotate_weights([weight], [rotation])
        torch.autograd.grad(F.linear(x, rotated), (x, q_in, q_out), grad)

    def on_activations() -> None:
        (y,) = rotate_activations(x, [(weight, None)], [rotation], identity=False)
        torch.autograd.grad(y, (x, q_in, q_out), grad)

    def frozen() -> None:
        torch.autograd.grad(F.linear(x, weight), x, grad)

    ways = {"frozen": frozen, "weight": on_weight, "activations": on_activations}
    best = dict.fromkeys(ways, float("inf"))
    for repetition, (name, way) in product(range(repetitions + 1), ways.items()):
        started = clock()
        way()
        if repetition:  # the first is for warming up
            best[name] = min(best[name], clock() - started)
    return best


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """What each side adds to the frozen layer over the tokens; a panel for each width, a colour for each block size."""
    dtypes = sorted({record["dtype"] for record in records})
    figure, axes = plt.subplots(
        len(dtypes), len(WIDTHS), figsize=(4 * len(WIDTHS), 3.4 * len(dtypes)), squeeze=False, layout="constrained"
    )
    for (row, dtype), (column, width) in product(enumerate(dtypes), enumerate(WIDTHS)):
        panel = axes[row][column]
        for number, size in enumerate(BLOCK_SIZES):
            found = [r for r in records if (r["dtype"], r["width"], r["block_size"]) == (dtype, width, size)]
            found.sort(key=lambda record: record["tokens"])
            for side, style in (("weight", "-"), ("activations", "--")):
                tokens = [record["tokens"] for record in found]
                panel.plot(tokens, [r[side] / r["frozen"] for r in found], style, color=f"C{number}", marker=".")
        panel.set(xscale="log", yscale="log", title=f"width {width}, {dtype}", xlabel="tokens × batch")
        panel.axhline(1, color="grey", linewidth=0.5)
    axes[0][0].set_ylabel("step of one projection / frozen")
    lines = [plt.Line2D([], [], color=f"C{n}", label=f"blocks of {size}") for n, size in enumerate(BLOCK_SIZES)]
    lines.append(plt.Line2D([], [], color="k", linestyle="-", label="weight"))
    lines.append(plt.Line2D([], [], color="k", linestyle="--", label="activations"))
    axes[0][-1].legend(handles=lines, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _predicted(record: dict[str, Any], on: torch.device) -> bool:
    width = record["width"]
    weight = torch.empty(width, width, dtype=DTYPES[record["dtype"]], device=on)
    return weight_side_is_cheaper(record["tokens"], weight)


def fit(records: list[dict[str, Any]]) -> list[float]:
    """The launch, bandwidth and multiply-adds a second with which the costs come nearest to what was measured.

    By the mean of the absolute logarithms of estimated over measured times, so that every point counts alike.
    """
    column = {key: torch.tensor([float(r[key]) for r in records], dtype=torch.float64) for key in NUMBERS}
    width, tokens, frozen = column["width"], column["tokens"], column["frozen"]
    size = torch.tensor([DTYPES[r["dtype"]].itemsize for r in records], dtype=torch.float64)
    logarithms = torch.tensor([1e-5, 1e10, 1e11], dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.Adam([logarithms], lr=0.03)
    for _ in range(4000):
        launch, bandwidth, madds = logarithms.exp()
        weight = WEIGHT_LAUNCHES * launch + width**2 * (WEIGHT_BYTES / bandwidth + tokens * size / 2 / madds)
        activations = ACTIVATION_LAUNCHES * launch + 2 * tokens * width * ACTIVATION_ACCESSES * size / bandwidth
        wrong = [
            ((frozen + estimated) / column[side]).log().abs().mean()
            for side, estimated in (("weight", weight), ("activations", activations))
        ]
        optimizer.zero_grad()
        torch.stack(wrong).sum().backward()
        optimizer.step()
    return logarithms.exp().tolist()


if __name__ == "__main__":
    main()
