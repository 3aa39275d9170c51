"""From the cells of a comparison to tables, plots and a page with the pictures.

    python -m eval.report results/mini

Writes `report.md`, `table.csv`, `learning_rates.csv`, `pareto.svg`, `learning_rates.svg`, `curves.svg` and
`report.html`, which holds everything and opens from disk.
"""

from __future__ import annotations

import argparse
import base64
import cmath
import csv
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from eval.cell import read_results
from eval.experiment import Cell, Experiment, budgets_of, sweep_cells
from eval.methods import METHODS
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import whole_file
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.metrics import Interval

SETTINGS, PAGE_NAME = "experiment.yaml", "report.html"
SCORES = {  # what tables show, with the direction that is better
    "clip_i_base_prompt": "CLIP-I, base prompt ↑",
    "clip_i": "CLIP-I ↑",
    "dino": "DINO ↑",
    "clip_t": "CLIP-T ↑",
    "balance": "balance ↑",
    "dino_nearest": "nearest photo",
    "pres": "PRES ↓",
    "div": "DIV ↑",
    "drift": "drift ↓",
}
COMPARED = ("dino", "clip_i", "clip_t", "balance")
OURS = "double_gsoft"
COLORS = dict(zip(METHODS, ("#c1121f", "#f08a24", "#1d6fb8", "#2a9d4a", "#7b4fb5", "#6b6b6b"), strict=True))
MARKERS = {"small": "o", "medium": "s", "large": "^", None: "D"}
PLOTS = {"Scores": ("pareto", "curves"), "Learning rates": ("learning_rates",)}  # of the page's sections
THUMBNAIL = 160
MINIATURE = (
    "Scored with the bundled miniature encoders: these numbers compare with each other only, "
    "not with any that the field's CLIP or DINO gives."
)


@dataclass(frozen=True)
class Line:
    """One line of the table: a method at a size, over all subjects and seeds.

    scores: for each name of `SCORES`, by subject, one value a seed.
    """

    method: str
    budget: str | None
    learning_rate: float | None
    results: list[dict[str, Any]]
    scores: dict[str, dict[str, list[float]]]

    @property
    def name(self) -> str:
        named = {"base": "Base model", "photos": "Real photos"}
        return named.get(self.method) or METHODS[self.method]

    @property
    def size(self) -> str:
        return self.results[0].get("size", "") if self.results else ""

    def mean(self, fact: str) -> float | None:
        values = [result[fact] for result in self.results if result.get(fact) is not None]
        return metrics.mean(values) if values else None

    def interval(self, score: str) -> Interval | None:
        return metrics.bootstrap(self.scores[score]) if self.scores.get(score) else None


# From cells to lines


def check_comparable(results: Sequence[Mapping[str, Any]]) -> None:
    """UserError naming the cells that were made with another base model, other encoders or photos than the rest."""
    _check_same(results, "encoders", "encoders")
    models = [{**result, "base_model": result["base_model"]["fingerprint"]} for result in results]
    _check_same(models, "base_model", "base model")
    for subject in {result["cell"]["subject"] for result in results}:
        of_subject = [result for result in results if result["cell"]["subject"] == subject]
        _check_same(of_subject, "photos_hash", f"photos of {subject}")


def _check_same(results: Sequence[Mapping[str, Any]], fact: str, what: str) -> None:
    found = [(Cell(**result["cell"]).id, result[fact]) for result in results if fact in result]
    usual = Counter(str(value) for _, value in found).most_common(1)
    odd = [name for name, value in found if str(value) != usual[0][0]]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(
            f"cells/{odd[0]}{more}: made with other {what} than the rest, so they do not compare; delete them and run "
            "eval.benchmark again"
        )


def choose_learning_rates(experiment: Experiment, out: Path) -> dict[str, float]:
    """For each method the learning rate of the best balance in the sweep.

    UserError if all of them diverged, or if cells do not compare.
    """
    check_comparable(read_results(out))
    chosen = {}
    for method, by_rate in sweep_lines(experiment, out).items():
        rates = getattr(experiment.learning_rates, method)
        balances = {rate: line.interval("balance") for rate, line in by_rate.items()}
        good = {rate: interval.mean for rate, interval in balances.items() if interval}
        if len(rates) > 1 and not good:
            raise UserError(f"learning_rates.{method}: training diverged at all of {', '.join(map(str, rates))}")
        chosen[method] = max(good, key=lambda rate: good[rate]) if len(rates) > 1 else rates[0]
    return chosen


def sweep_lines(experiment: Experiment, out: Path) -> dict[str, dict[float, Line]]:
    """By method and learning rate, the cells of the sweep. A rate at which any of them diverged has no scores."""
    results = {Cell(**result["cell"]): result for result in read_results(out)}
    references = _references(results.values())
    lines: dict[str, dict[float, Line]] = {method: {} for method in experiment.methods}
    cells = sweep_cells(experiment)
    for method, budget, rate in dict.fromkeys(cell.row for cell in cells):
        found = [results[cell] for cell in cells if cell.row == (method, budget, rate) and cell in results]
        lines[method][rate or 0] = _line(method, budget, rate, found, references)
    return lines


def table_lines(experiment: Experiment, out: Path) -> list[Line]:
    """The lines of the table: real photos, base model, then every budget's methods. UserError if cells are missing."""
    results = read_results(out)
    references = _references(results)
    rates = choose_learning_rates(experiment, out)
    subjects = {subject.name for subject in experiment.chosen_subjects()}

    def found(method: str, budget: str | None, rate: float | None) -> list[dict[str, Any]]:
        row = (method, budget, rate)
        cells = {Cell(**result["cell"]): result for result in results}
        chosen = [r for c, r in cells.items() if c.row == row and c.subject in subjects and c.seed < experiment.seeds]
        if len(chosen) != len(subjects) * experiment.seeds:
            raise UserError(f"{out}: {method} {budget or ''} lacks cells; run eval.benchmark again to complete it")
        return chosen

    base = found("base", None, None)
    photos: dict[str, dict[str, list[float]]] = {
        name: {result["cell"]["subject"]: [result["photos"][name]] for result in base}
        for name in ("clip_i", "dino", "clip_t")
    }
    lines = [Line("photos", None, None, [], photos), _line("base", None, None, base, references)]
    for budget in (*experiment.budgets, None):
        for method in experiment.methods:
            if budget in budgets_of(method, experiment):
                lines.append(_line(method, budget, rates[method], found(method, budget, rates[method]), references))
    return lines


References = dict[tuple[str, int], tuple[tuple[float, float], tuple[float, float]]]


def _references(results: Any) -> References:
    """For each subject and seed what balance is measured between: (DINO, CLIP-T) of base model and photos."""
    return {
        (result["cell"]["subject"], result["cell"]["seed"]): (
            (result["scores"]["dino"], result["scores"]["clip_t"]),
            (result["photos"]["dino"], result["photos"]["clip_t"]),
        )
        for result in results
        if result["cell"]["method"] == "base"
    }


def _line(
    method: str, budget: str | None, rate: float | None, results: list[dict[str, Any]], references: References
) -> Line:
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in SCORES}
    whole = results if all("scores" in result for result in results) else []  # one that diverged spoils its line
    for result in sorted(whole, key=lambda result: result["cell"]["seed"]):
        subject, seed = result["cell"]["subject"], result["cell"]["seed"]
        found = dict(result["scores"])
        if method != "base":
            base, photos = references[subject, seed]
            found["balance"] = metrics.balance(found["dino"], found["clip_t"], base, photos)
        for name in SCORES:
            if name in found:
                scores[name].setdefault(subject, []).append(found[name])
    return Line(method, budget, rate, results, scores)


def differences(lines: Sequence[Line], ours: str = OURS) -> list[tuple[str, str, dict[str, Interval]]]:
    """Our method minus each other one of the same budget, paired by subject and seed: (budget, other, intervals)."""
    mine = {line.budget: line for line in lines if line.method == ours}
    found = []
    for other in lines:
        if other.method in ("photos", "base", "full", ours) or other.budget not in mine:
            continue
        intervals = {}
        for name in COMPARED:
            a, b = mine[other.budget].scores[name], other.scores[name]
            if a and a.keys() == b.keys():
                pairs = {s: [x - y for x, y in zip(a[s], b[s], strict=True)] for s in a}
                intervals[name] = metrics.bootstrap(pairs)
        found.append((other.budget or "", other.name, intervals))
    return found


# Tables


def table_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The table's cells as text, in the shape of the paper's Table 2."""
    return [
        {
            "method": line.name,
            "budget": line.budget or "",
            "size": line.size,
            "parameters": f"{parameters:,.0f}" if (parameters := line.mean("parameters")) else "",
            "learning rate": f"{line.learning_rate:g}" if line.learning_rate else "",
            "minutes": f"{seconds / 60:.1f}" if (seconds := line.mean("train_seconds")) else "",
            "peak memory, GiB": f"{size / 2**30:.2f}" if (size := line.mean("peak_memory_bytes")) else "",
            **{title: _text(line.interval(name)) for name, title in SCORES.items()},
        }
        for line in lines
    ]


def sweep_rows(
    sweep: Mapping[str, Mapping[float, Line]], chosen: Mapping[str, float], references: References
) -> list[dict[str, str]]:
    """Every learning rate at the end of training, and before where curves were recorded."""
    rows = []
    for method, by_rate in sweep.items():
        for rate, line in by_rate.items():
            steps: Sequence[int | None] = recorded_steps(line) or [None]
            for step in steps:
                shown = line if step is None else at_step(line, step, references)
                texts = {SCORES[name]: _short(shown.interval(name)) for name in ("dino", "clip_t", "balance")}
                if line.results and not line.scores["dino"]:
                    texts = dict.fromkeys(texts, "diverged")
                names = {"method": METHODS[method], "steps": str(step or ""), "learning rate": f"{rate:g}"}
                rows.append(names | texts | {"chosen": "✓" if rate == chosen[method] and step == steps[-1] else ""})
    return rows


def recorded_steps(line: Line) -> list[int]:
    """After how many steps all of a line's cells were scored, by their curves."""
    curves = [result["curve"] for result in line.results if "curve" in result]
    return [point["step"] for point in curves[0]] if curves and len(curves) == len(line.results) else []


def at_step(line: Line, step: int, references: References) -> Line:
    """The line as it was after so many steps of its training."""
    results = [
        result | {"scores": point} for result in line.results for point in result["curve"] if point["step"] == step
    ]
    return _line(line.method, line.budget, line.learning_rate, results, references)


def difference_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    return [
        {
            "budget": budget,
            f"{METHODS[OURS]} minus": other,
            **{SCORES[name].split(" ")[0]: _text(intervals.get(name), signed=True) for name in COMPARED},
        }
        for budget, other, intervals in differences(lines)
    ]


def _text(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return ""
    mark = "+" if signed else ""
    if interval.low is None:
        return f"{interval.mean:{mark}.3f} [–]"
    return f"{interval.mean:{mark}.3f} [{interval.low:{mark}.3f}, {interval.high:{mark}.3f}]"


def _short(interval: Interval | None) -> str:
    return f"{interval.mean:.3f}" if interval else ""


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_text(rows: Sequence[Mapping[str, str]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def csv_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Plain numbers: one column each for mean, low and high; empty where there is none."""
    rows = []
    for line in lines:
        row = {
            "method": line.method,
            "budget": line.budget or "",
            "size": line.size,
            "learning_rate": "" if line.learning_rate is None else str(line.learning_rate),
        }
        for fact in ("parameters", "train_seconds", "pictures_seconds", "peak_memory_bytes", "orthogonality_error"):
            value = line.mean(fact)
            row[fact] = "" if value is None else f"{value:.6g}"
        for name in SCORES:
            interval = line.interval(name)
            for part in ("mean", "low", "high"):
                value = getattr(interval, part, None)
                row[f"{name}_{part}"] = "" if value is None else f"{value:.6f}"
        rows.append(row)
    return rows


# Plots


def pareto_plot(lines: Sequence[Line], miniature: bool) -> str:
    """Subject against prompt fidelity with intervals, as SVG; up and to the right is better."""
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
    for method in METHODS:
        points = [(line.interval("clip_t"), line.interval("dino")) for line in lines if line.method == method]
        reached = [(x.mean, y.mean) for x, y in points if x and y]
        if len(reached) > 1:
            axes.plot(*zip(*reached, strict=True), color=COLORS[method], linewidth=0.8, alpha=0.5)
    if not any(interval.low is not None for line in lines if (interval := line.interval("dino"))):
        axes.set_title("one subject and one seed, so no intervals", fontsize=8)
    return _trade_off(figure, axes, miniature)


def _error_bars(interval: Interval) -> list[list[float]] | None:
    """How far the bounds are below and above the mean, as matplotlib wants it; None where there are none."""
    if interval.low is None or interval.high is None:
        return None
    return [[interval.mean - interval.low], [interval.high - interval.mean]]


def sweep_plot(sweep: Mapping[str, Mapping[float, Line]], chosen: Mapping[str, float], miniature: bool) -> str | None:
    """Where every learning rate of the sweep ends up between subject and prompt, as SVG: a line a method.

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
        axes.plot(*zip(*points.values(), strict=True), color=COLORS[method], linewidth=1, label=METHODS[method])
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


def _trade_off(figure: Figure, axes: Axes, miniature: bool) -> str:
    """The figure with the axes of the trade-off, as SVG."""
    small = " (miniature encoders)" if miniature else ""
    axes.set_xlabel(f"prompt: CLIP-T{small}")
    axes.set_ylabel(f"subject: DINO{small}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    return _svg(figure)


def curve_plot(lines: Sequence[Line], miniature: bool) -> str | None:
    """DINO and CLIP-T over training steps, averaged over subjects, as SVG; None if no curve was recorded."""
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


# The report


def write_report(experiment: Experiment, out: Path) -> list[Path]:
    """Write all files of the report; returns their paths, the page with the pictures last."""
    lines = table_lines(experiment, out)
    chosen = choose_learning_rates(experiment, out)
    swept = sweep_lines(experiment, out)
    sweep = sweep_rows(swept, chosen, _references(read_results(out)))
    results = [result for line in lines for result in line.results]
    encoders = results[0]["encoders"]
    miniature = encoders["clip"]["miniature"] or encoders["dino"]["miniature"]
    plots = {
        "pareto": pareto_plot(lines, miniature),
        "learning_rates": sweep_plot(swept, chosen, miniature),
        "curves": curve_plot(lines, miniature),
    }
    sections = {
        "": _introduction(experiment, lines, results, encoders),
        "Scores": markdown_table(table_rows(lines)),
        f"{METHODS[OURS]} against the others": markdown_table(difference_rows(lines)),
        "Learning rates": markdown_table(sweep),
    }
    texts = {
        "report.md": "\n\n".join(
            f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text
        ),
        "table.csv": csv_text(csv_rows(lines)),
        "learning_rates.csv": csv_text(sweep),
        **{f"{name}.svg": svg for name, svg in plots.items() if svg},
        PAGE_NAME: page(experiment, out, lines, sections, plots),
    }
    for name, text in texts.items():
        with whole_file(out / name) as file:
            file.write(f"{text.rstrip()}\n".encode())
    return [out / name for name in texts]


def _introduction(
    experiment: Experiment, lines: Sequence[Line], results: Sequence[Mapping[str, Any]], encoders: Mapping[str, Any]
) -> str:
    subjects = sorted({result["cell"]["subject"] for result in results})
    versions = ", ".join(f"{name} {value}" for name, value in results[0]["versions"].items())
    described = [
        f"{e['kind']} {e['name']}, weights {e['weights']}, {e['preprocessing']['size']} px, by {e['library']}"
        for e in encoders.values()
    ]
    miniature = encoders["clip"]["miniature"] or encoders["dino"]["miniature"]
    swept = any(len(getattr(experiment.learning_rates, method)) > 1 for method in experiment.methods)
    diverged = [
        f"{line.name} {line.budget or ''}".strip() for line in lines if any("diverged" in r for r in line.results)
    ]
    return "\n\n".join(
        [
            "# Comparison of fine-tuning methods",
            *([f"**{MINIATURE}**"] if miniature else []),
            f"Base model {results[0]['base_model']['name']}; {len(subjects)} subjects ({', '.join(subjects)}), "
            f"{experiment.seeds} seeds, {experiment.max_train_steps} steps at batch {experiment.train_batch_size}, "
            "the same for all methods; "
            + ("every method's learning rate is the best of its sweep." if swept else "learning rates as given."),
            f"Scores are averaged within each subject first; in brackets {_intervals(lines, len(subjects))}. "
            "CLIP-I, DINO and CLIP-T over all context prompts are DreamBooth's protocol; CLIP-I on the base "
            "prompt with CLIP-T on context prompts is the GSOFT paper's. Captions for CLIP-T are the prompts "
            f"{results[0]['captions']}. Balance is the harmonic mean of how far DINO has come from the base model's "
            "to the real photos' and how much of the base model's CLIP-T is left above that of the photos. Nearest "
            "photo is DINO with the most similar training photo; near 1 it was copied. PRES is DINO of pictures of "
            "the class with the subject's photos, DIV 1 − DINO between pictures of one prompt, drift 1 − CLIP "
            "similarity with the base model's picture for unrelated prompts.",
            f"Encoders: {'; '.join(described)}.",
            *([f"Training diverged, so there is no score: {', '.join(diverged)}."] if diverged else []),
            f"{results[0]['device']}, {results[0]['threads']} threads a cell; {versions}.",
        ]
    )


def _intervals(lines: Sequence[Line], subjects: int) -> str:
    """How the intervals in the brackets of the tables were made."""
    found = [interval for line in lines if (interval := line.interval("dino"))]
    none = [interval for interval in found if interval.low is None]
    if len(none) == len(found):
        return "– and no interval, since one subject and one seed say nothing of how scores spread"
    over = "subjects and seeds" if subjects > 1 else "seeds, which say nothing of other subjects"
    return f"95 % bootstrap intervals over {over}" + (" (–: of a single score there is none)" if none else "")


def page(
    experiment: Experiment,
    out: Path,
    lines: Sequence[Line],
    sections: Mapping[str, str],
    plots: Mapping[str, str | None],
) -> str:
    """One HTML page that needs no other file: tables, plots, pictures side by side under the same prompt and seed."""
    parts = []
    for title, text in sections.items():
        parts.append((f"<h2>{html.escape(title)}</h2>" if title else "") + _html(text))
        for name in PLOTS.get(title, ()):
            if svg := plots[name]:
                parts.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
    parts.append("<h2>Pictures</h2>" + _pictures(experiment, out, lines))
    return PAGE.replace("{body}", "\n".join(parts))


def _html(text: str) -> str:
    """HTML for the subset of Markdown that the sections use."""
    blocks = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
            cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            blocks.append("<div class=wide><table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>")
        elif block.startswith("# "):
            blocks.append(f"<h1>{html.escape(block[2:])}</h1>")
        elif block.startswith("**"):
            blocks.append(f"<p class=note>{html.escape(block.strip('*'))}</p>")
        elif block:
            blocks.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(blocks)


def _pictures(experiment: Experiment, out: Path, lines: Sequence[Line]) -> str:
    """For each subject at seed 0 one table: a row for each prompt, a column for each method."""
    columns = [line for line in lines if line.results]
    blocks: list[str] = []
    for subject in experiment.chosen_subjects():
        cells = [
            next(
                result
                for result in line.results
                if result["cell"]["subject"] == subject.name and result["cell"]["seed"] == 0
            )
            for line in columns
        ]
        photos = "".join(_image(open_image(path), "a photo") for path in subject.photos())
        titles = [html.escape(f"{line.name} {line.budget or ''}") for line in columns]
        rows = ["<tr><th>prompt</th>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"]
        shown = [p for p in cells[0]["pictures"] if p["seed"] == 0 and p["kind"] in ("context", "base")]
        for picture in shown:
            images = [_cell_image(out, result, picture["file"]) for result in cells]
            label = f"{html.escape(picture['prompt'])}<br><small>seed {picture['seed']}</small>"
            rows.append(f"<tr><td>{label}</td>" + "".join(f"<td>{image}</td>" for image in images) + "</tr>")
        blocks.append(
            f"<details{' open' if not blocks else ''}><summary>{html.escape(subject.name)}</summary>"
            f"<p class=photos>{photos}</p><div class=wide><table class=pictures>{''.join(rows)}</table></div></details>"
        )
    return "\n".join(blocks)


def _cell_image(out: Path, result: Mapping[str, Any], file: str) -> str:
    scored = [picture for picture in result.get("pictures", []) if picture["file"] == file]
    if not scored:
        return "diverged"
    caption = f"DINO {scored[0]['dino']:.2f}, CLIP-T {scored[0]['clip_t']:.2f}"
    folder = out / "cells" / Cell(**result["cell"]).id
    try:
        return _image(open_image(folder / file), caption)
    except UserError as error:
        raise UserError(f"{error}. It is a cell's: delete {folder} and run eval.benchmark again") from error


def _image(picture: Image.Image, caption: str) -> str:
    """The picture inside the page: small ones as they are, large ones reduced."""
    file, kind = io.BytesIO(), "png"
    if max(picture.size) > THUMBNAIL:
        picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
        kind = "jpeg"
    picture.save(file, kind)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{data}" title="{html.escape(caption)}" alt="{html.escape(caption)}">'


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of fine-tuning methods</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 }
.note { background: #fff3cd; border-left: 4px solid #e0a800; padding: .6rem 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #888 }
.pictures td, .pictures th { padding: .2rem; vertical-align: top }
.pictures td:first-child { white-space: normal; min-width: 9rem }
img { width: 96px; height: 96px; object-fit: cover; image-rendering: auto; border-radius: 3px }
.photos img { margin-right: 4px }
figure { margin: 1rem 0 }
svg { max-width: 100%; height: auto }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; padding: .4rem 0 }
</style>
{body}
</html>
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=expanded_path, help="folder that eval.benchmark wrote to")
    args = parser.parse_args()
    for path in write_report(Experiment.from_dict(read_yaml(args.out / SETTINGS)), args.out):
        print(path)
    return 0


if __name__ == "__main__":
    run(main)
