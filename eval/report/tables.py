"""The report's tables as rows of text, and their Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from eval.methods import TITLES
from eval.report.intervals import Interval
from eval.report.lines import COMPARED, OURS, SCORES, Line, References, at_step, differences, steps_of


def table_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The table's cells as text, in the shape of the paper's Table 2.

    lines: what is shown.
    """
    return [
        {
            "method": line.name,
            "budget": line.budget or "",
            "size": line.size,
            "parameters": f"{parameters:,.0f}" if (parameters := line.mean("parameters")) else "",
            "learning rate": f"{line.learning_rate:g}" if line.learning_rate else "",
            "minutes": f"{seconds / 60:.1f}" if (seconds := line.mean("train_seconds")) else "",
            "peak memory, GiB": f"{size / 2**30:.2f}" if (size := line.mean("peak_memory_bytes")) else "",
            **{title: text_of(line.interval(name)) for name, title in SCORES.items()},
        }
        for line in lines
    ]


def sweep_rows(
    sweep: Mapping[str, Mapping[float, Line]], chosen: Mapping[str, float], ends: References
) -> list[dict[str, str]]:
    """Every learning rate at the end of training, and before where curves were recorded; steps only if any were.

    sweep: lines by method and learning rate. chosen: the rate of each method, which is ticked at the end of its
    training. ends: what balance is measured between, see `references`.
    """
    rows = []
    curves = any(steps_of(line) for by_rate in sweep.values() for line in by_rate.values())
    for method, by_rate in sweep.items():
        for rate, line in by_rate.items():
            steps: Sequence[int | None] = steps_of(line) or [None]
            for step in steps:
                shown = line if step is None else at_step(line, step, ends)
                texts = {SCORES[name]: _short(shown.interval(name)) for name in ("dino", "clip_t", "balance")}
                if line.results and not line.scores["dino"]:
                    texts = dict.fromkeys(texts, "diverged")
                after = {"steps": str(step or "")} if curves else {}
                names = {"method": TITLES[method], **after, "learning rate": f"{rate:g}"}
                rows.append(names | texts | {"chosen": "✓" if rate == chosen[method] and step == steps[-1] else ""})
    return rows


def difference_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Our method minus each other one, as text; see `differences`.

    lines: of the table.
    """
    return [
        {
            "budget": budget,
            f"{TITLES[OURS]} minus": other,
            **{SCORES[name].split(" ")[0]: text_of(intervals.get(name), signed=True) for name in COMPARED},
        }
        for budget, other, intervals in differences(lines)
    ]


def text_of(interval: Interval | None, signed: bool = False) -> str:
    """A mean with its bounds as tables show them, `[–]` where there are none; empty for None.

    interval: what is shown. signed: whether positive numbers have their sign, as differences do.
    """
    if interval is None:
        return ""
    mark = "+" if signed else ""
    if interval.low is None:
        return f"{interval.mean:{mark}.3f} [–]"
    return f"{interval.mean:{mark}.3f} [{interval.low:{mark}.3f}, {interval.high:{mark}.3f}]"


def _short(interval: Interval | None) -> str:
    return f"{interval.mean:.3f}" if interval else ""


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a Markdown table, headed by the first one's keys; empty without rows."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_text(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as CSV, headed by the first one's keys."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def csv_rows(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Plain numbers: one column each for mean, low and high; empty where there is none.

    lines: of the table.
    """
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
