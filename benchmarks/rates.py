"""Which learning rate is best for which size, with learned numbers as they are and scaled: `gsoft.blocks.skew_factor`.

python -m benchmarks.rates --out benchmarks/results/rates.json --plot docs/images/rates.png

One layer learns one thing, as in fine-tuning on a few photos: inputs near one direction must be answered as if they
were turned by half a radian. There are 50 steps of Adam on four noisy inputs each. The error has two parts: how far
the answer is from what was asked for, and how far answers to unrelated inputs moved. The layer's weight, the direction
and the noise are random; errors are means of several seeds. The best rate is the minimum of a parabola through the
errors of the best rate that was tried and its neighbours, on logarithmic scales. Printed are also the power of the
numbers in a row with which best rates fall, and what it costs to use the one rate that suits all sizes best.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from itertools import product
from pathlib import Path
from typing import Any, get_args

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import gsoft
from benchmarks.measure import Records, file_to_write, table
from gsoft.config import Parametrization
from gsoft_diffusion.config.command_line import expanded_path

matplotlib.use("agg")
from matplotlib import pyplot as plt

SIZES = ((64, 4), (64, 8), (64, 32), (320, 5), (320, 20), (320, 80), (1280, 10), (1280, 40), (1280, 160))
RATES = {"cayley": range(4, 15), "scaled_cayley": range(6, 17)}  # exponents of 1/2
STEPS, BATCH, NOISE, TURN = 50, 4, 0.5, 0.5
UNRELATED = 256  # inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parametrizations", nargs="+", choices=get_args(Parametrization), default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    parser.add_argument("--plot", type=expanded_path, help="PNG to draw")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Q is not dense")  # two factors, as in the paper
    settings = {"steps": STEPS, "batch": BATCH, "noise": NOISE, "turn": TURN}
    records = Records(args.out, settings)
    points = [
        {"parametrization": name, "width": width, "block_size": size, "seed": seed, "rate": 2.0**-exponent}
        for name, (width, size), seed in product(args.parametrizations, SIZES, range(args.seeds))
        for exponent in RATES[name]
    ]
    for point in tqdm([point for point in points if not records.has(**point)], unit="training"):
        records.add(**point, **train(**point))
    print(summary(records.records))
    if args.plot:
        plot(records.records, args.plot)


def train(parametrization: Any, width: int, block_size: int, seed: int, rate: float) -> dict[str, float]:
    """The two parts of the error after training; 1 is what the base layer has of the first."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, width, generator=generator) / math.sqrt(width)
    known, other = (F.normalize(torch.randn(width, generator=generator), dim=0) for _ in range(2))
    other = F.normalize(other - (other @ known) * known, dim=0)
    asked = math.sqrt(width) * (math.cos(TURN) * known + math.sin(TURN) * other)
    known = math.sqrt(width) * known
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    model[0].weight.data = weight.clone()
    config = gsoft.Config(
        target_modules=["0"], block_size=block_size, output_scale=False, parametrization=parametrization
    )
    optimizer = torch.optim.Adam(gsoft.inject(model, config).parameters(), lr=rate)
    for _ in range(STEPS):
        noise = NOISE * torch.randn(BATCH, width, generator=generator)
        loss = (model(known + noise) - (asked + noise) @ weight.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        unrelated = torch.randn(UNRELATED, width, generator=generator)
        change = (asked - known) @ weight.T

        def moved(x: Tensor, wanted: Tensor) -> float:
            return ((model(x) - wanted @ weight.T).square().mean() / change.square().mean()).item()

        return {"asked": moved(known[None], asked[None]), "unrelated": moved(unrelated, unrelated)}


def errors(records: list[dict[str, Any]], name: str, width: int, size: int) -> dict[float, float]:
    """The mean error by rate, of a parametrization at one size."""
    by_rate: dict[float, list[float]] = {}
    for record in records:
        if (record["parametrization"], record["width"], record["block_size"]) == (name, width, size):
            by_rate.setdefault(record["rate"], []).append(record["asked"] + record["unrelated"])
    return {rate: sum(found) / len(found) for rate, found in sorted(by_rate.items())}


def best_rates(records: list[dict[str, Any]]) -> dict[str, dict[tuple[int, int], float]]:
    """The best rate by parametrization and by width and side."""
    names = dict.fromkeys(record["parametrization"] for record in records)
    return {name: {pair: _minimum(errors(records, name, *pair)) for pair in SIZES} for name in names}


def _minimum(by_rate: dict[float, float]) -> float:
    rates, found = list(by_rate), [math.log(error) for error in by_rate.values()]
    best = min(range(len(found)), key=found.__getitem__)
    if not 0 < best < len(found) - 1:
        return rates[best]
    before, here, after = found[best - 1 : best + 2]
    return rates[best] * 2 ** (0.5 * (before - after) / (before - 2 * here + after))


def summary(records: list[dict[str, Any]]) -> str:
    """A table of best rates, how far apart they are, and what one rate for all sizes would cost."""
    found = best_rates(records)
    rows = [[str(w), str(b), *(f"{rates[w, b]:.2g}" for rates in found.values())] for w, b in SIZES]
    spread = [f"{max(rates.values()) / min(rates.values()):.1f}" for rates in found.values()]
    rows.append(["largest / smallest", "", *spread])
    rows.append(["power of numbers in a row", "", *(f"{_power(rates):.2f}" for rates in found.values())])
    common = [one_rate(records, name) for name in found]
    rows.append(["one rate for all", "", *(f"{rate:.2g}" for rate, _ in common)])
    rows.append(["error at it / at each size's best, worst size", "", *(f"{worst:.2f}" for _, worst in common)])
    return table(["width", "block", *found], rows)


def _power(rates: dict[tuple[int, int], float]) -> float:
    """The slope of the best rate over the learned numbers in a row of `Q_out` and `Q_in`, on logarithmic scales."""
    x = [math.log(2 * 2 * (size - 1)) for _, size in rates]  # two sides of two factors
    y = [math.log(rate) for rate in rates.values()]
    return statistics.linear_regression(x, y).slope


def one_rate(records: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Of the rates that were tried the one whose worst ratio of errors, to the least at the same size, is smallest."""
    ratios: dict[float, float] = {}
    for pair in SIZES:
        by_rate = errors(records, name, *pair)
        for rate, error in by_rate.items():
            ratios[rate] = max(ratios.get(rate, 0.0), error / min(by_rate.values()))
    return min(ratios.items(), key=lambda item: item[1])


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """The error over the rate; a panel for each parametrization, a line for each size."""
    names = list(dict.fromkeys(record["parametrization"] for record in records))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names) + 2, 3.8), squeeze=False, layout="constrained")
    for panel, name in zip(axes[0], names, strict=True):
        for width, size in SIZES:
            by_rate = errors(records, name, width, size)
            style = {64: ":", 320: "--", 1280: "-"}[width]
            panel.plot(list(by_rate), list(by_rate.values()), style, label=f"width {width}, blocks of {size}")
        panel.set(xscale="log", yscale="log", title=name, xlabel="learning rate", ylim=(0.005, 3))
    axes[0][0].set_ylabel("error")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
