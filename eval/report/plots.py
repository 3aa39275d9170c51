"""The report's plots, as SVG."""

from __future__ import annotations

import cmath
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.methods import TITLES
from eval.report.fronts import front_with_base
from eval.report.grid import Fronts
from eval.report.intervals import Interval
from eval.report.lines import Line
from gsoft_diffusion.scoring import metrics

COLORS = {
    "double_gsoft": "#c1121f",
    "gsoft": "#f08a24",
    "lora": "#1d6fb8",
    "dora": "#5fb3e6",
    "boft": "#2a9d4a",
    "oft": "#7b4fb5",
    "hra": "#a8c545",
    "lokr": "#d46fa8",
    "full": "#6b6b6b",
    "double_gsoft_dense": "#7a0c16",
    "double_gsoft_unscaled": "#e8788a",
    "double_gsoft_denoiser": "#8c5a2b",
}
MARKERS = {"small": "o", "medium": "s", "large": "^", None: "D"}


def pareto_plot(lines: Sequence[Line], miniature: bool) -> str:
    """Subject against prompt fidelity with intervals, as SVG; up and to the right is better.

    lines: of the table; one without scores is left out. miniature: whether miniature encoders scored, which the axes
    say.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        x, y = line.interval("clip_t"), line.interval("dino")
        if x is None or y is None:
            continue
        color, marker = COLORS.get(line.method, "#222222"), MARKERS[line.budget]
        if line.method in ("base", "photos"):
            marker = "*" if line.method == "photos" else "X"
        spread: dict[str, Any] = {"xerr": _error_bars(x), "yerr": _error_bars(y)}
        label = f"{line.name}{f', {line.budget}' if line.budget else ''}"
        axes.errorbar(x.mean, y.mean, fmt=marker, color=color, elinewidth=0.6, alpha=0.85, label=label, **spread)
    for method in TITLES:
        points = [(line.interval("clip_t"), line.interval("dino")) for line in lines if line.method == method]
        reached = [(x.mean, y.mean) for x, y in points if x and y]
        if len(reached) > 1:
            axes.plot(*zip(*reached, strict=True), color=COLORS[method], linewidth=0.8, alpha=0.5)
    if not any(interval.low is not None for line in lines if (interval := line.interval("dino"))):
        axes.set_title("one subject or one seed, so no intervals", fontsize=8)
    return _trade_off(figure, axes, miniature)


def _error_bars(interval: Interval) -> list[list[float]] | None:
    """How far the bounds are below and above the mean, as matplotlib wants it; None where there are none."""
    if interval.low is None or interval.high is None:
        return None
    return [[interval.mean - interval.low], [interval.high - interval.mean]]


def sweep_plot(sweep: Mapping[str, Mapping[float, Line]], chosen: Mapping[str, float], miniature: bool) -> str | None:
    """Where every learning rate of the sweep ends up between subject and prompt, as SVG: a line a method.

    sweep: lines by method and learning rate. chosen: the rate of each method. miniature: whether miniature encoders
    scored, which the axes say.

    The chosen rates are large; these and the ends are labelled. Methods whose lines coincide make the same trade at
    different rates. None without a sweep.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (method, by_rate) in enumerate(sweep.items()):
        ends = {rate: (line.interval("clip_t"), line.interval("dino")) for rate, line in sorted(by_rate.items())}
        points = {rate: (x.mean, y.mean) for rate, (x, y) in ends.items() if x and y}
        if not points:
            continue
        axes.plot(*zip(*points.values(), strict=True), color=COLORS[method], linewidth=1, label=TITLES[method])
        for rate, point in points.items():
            axes.plot(*point, "o", color=COLORS[method], markersize=8 if rate == chosen[method] else 3)
        for rate in {min(points), chosen[method], max(points)} & points.keys():
            away = cmath.rect(14, number * cmath.tau / len(sweep))  # each method's labels on a side of their own
            axes.annotate(
                f"{rate:g}",
                points[rate],
                (away.real, away.imag),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=6,
                color=COLORS[method],
            )
    return _trade_off(figure, axes, miniature) if axes.lines else None


def front_plot(fronts: Fronts, miniature: bool) -> str:
    """Every method's settings and its front, as SVG: a panel a size; up and to the right is better.

    fronts: what is drawn; what has one size, like full fine-tuning, is in every panel. miniature: whether miniature
    encoders scored, which the axes say.
    """
    budgets: list[str | None] = list(dict.fromkeys(each.budget for each in fronts.methods if each.budget)) or [None]
    figure = Figure(figsize=(1.5 + 4.2 * len(budgets), 4.6), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    small = " (miniature encoders)" if miniature else ""
    for axes, budget in zip(panels, budgets, strict=True):
        for each in fronts.methods:
            if each.budget in (budget, None):
                color, name = COLORS[each.method], TITLES[each.method]
                envelope = front_with_base(each.points, fronts.base)
                axes.plot(each.points[:, 1], each.points[:, 0], "o", color=color, markersize=2.5, alpha=0.5)
                axes.plot(envelope[:, 1], envelope[:, 0], color=color, linewidth=1.4, label=name)
        for (subject, prompt), marker, name in ((fronts.base, "X", "base model"), (fronts.photos, "*", "photos")):
            axes.plot(prompt, subject, marker, color="#222222", markersize=9, label=name)
        axes.set_title(budget or "", fontsize=10)
        axes.set_xlabel(f"prompt: CLIP-T{small}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"subject: DINO{small}")
    named = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[-1].legend(named.values(), named.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _trade_off(figure: Figure, axes: Axes, miniature: bool) -> str:
    """The figure with the axes of the trade-off, as SVG."""
    small = " (miniature encoders)" if miniature else ""
    axes.set_xlabel(f"prompt: CLIP-T{small}")
    axes.set_ylabel(f"subject: DINO{small}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    return _svg(figure)


def curve_plot(lines: Sequence[Line], miniature: bool) -> str | None:
    """DINO and CLIP-T over training steps, averaged over subjects, as SVG; None if no curve was recorded.

    lines: of the table. miniature: whether miniature encoders scored, which the axes say.
    """
    curves = {
        (line.method, line.budget, line.name): [result["curve"] for result in line.results if "curve" in result]
        for line in lines
    }
    if not any(curves.values()):
        return None
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (method, budget, name), recorded in curves.items():
        if recorded:
            label = f"{name}{f', {budget}' if budget else ''}"
            for axes, score in ((left, "dino"), (right, "clip_t")):
                _draw_curve(axes, recorded, score, color=COLORS[method], marker=MARKERS[budget], label=label)
    small = " (miniature encoders)" if miniature else ""
    for axes, title in ((left, "subject: DINO"), (right, "prompt: CLIP-T")):
        axes.set_xlabel("training steps")
        axes.set_ylabel(title + small)
        axes.grid(alpha=0.3)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _draw_curve(axes: Axes, recorded: Sequence[Sequence[Mapping[str, float]]], score: str, **style: Any) -> None:
    steps = [point["step"] for point in recorded[0]]
    means = [metrics.mean([curve[place][score] for curve in recorded]) for place in range(len(steps))]
    axes.plot(steps, means, linewidth=1, markersize=4, alpha=0.85, **style)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "gsoft", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
