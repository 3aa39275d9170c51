"""The table in the paper's form, differences with intervals, and the plot, from a comparison's `results.json`.

    python -m examples.language.report --out results/language

Intervals hold 95 % of what comes out when test texts and seeds are drawn again, with replacement. Two methods are
compared on the same drawn texts.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.measure import median, table
from examples.language.methods import METHODS
from examples.language.tasks import TASKS, score
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.foundation.errors import UserError

DRAWS = 1000
Records = Sequence[dict[str, Any]]  # of a comparison


class Drawn(NamedTuple):
    """A score: as it is, and `(DRAWS,)` as it comes out on texts and seeds that were drawn again."""

    value: float
    draws: NDArray[np.float64]

    def __str__(self) -> str:
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return f"{self.value:.1f} [{low:.1f}, {high:.1f}]"


Scores = dict[tuple[str, str], Drawn]  # by task and method


def chosen_rates(records: Records, sweep_tasks: Sequence[str]) -> dict[str, float]:
    """For each method the learning rate with the best mean of validation scores at seed 0, the lowest of equal ones.

    records: of a comparison. sweep_tasks: the tasks that count. A rate that diverged on one of them is not chosen.
    """
    swept: dict[str, dict[float, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["kind"] == "training" and record["seed"] == 0 and record["task"] in sweep_tasks:
            swept[record["method"]][record["learning_rate"]].append(record["validation"])
    rates = {}
    for method, by_rate in swept.items():
        means = {rate: np.mean(scores) for rate, scores in sorted(by_rate.items()) if None not in scores}  # type: ignore[arg-type]
        if means:
            rates[method] = max(means, key=lambda rate: means[rate])
    return rates


def write_report(out: Path) -> list[Path]:
    """Write `table.md` and `scores.svg`; returns their paths.

    out: folder with `results.json`. Raises UserError if that cannot be read, or is not of a whole comparison.
    """
    try:
        content = json.loads((out / "results.json").read_text(encoding="utf-8"))
        records = content["records"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{out / 'results.json'}: is not of examples.language.compare ({error})") from error
    rates = chosen_rates(records, content["settings"]["sweep_tasks"])
    if not _is_whole(records, content["settings"]["sweep_tasks"], rates):
        raise UserError(
            f"{out / 'results.json'}: is not of a whole comparison; run examples.language.compare again, with all "
            "methods and tasks that are in it, and the same --seeds for all"
        )
    scores = drawn_scores(records, rates)
    tasks = [task for task in TASKS if any(task == found for found, _ in scores)]
    methods = [method for method in METHODS if any(method == found for _, found in scores)]
    settings = "".join(f"\n- {name}: {_words(value)}" for name, value in content["settings"].items())
    machine = "".join(f"\n- {name}: {_words(value)}" for name, value in content["machine"].items())
    parts = [
        f"Written by `examples.language.report`. Settings:\n{settings}{machine}",
        "Percent with 95 % intervals; rating is Pearson's correlation, acceptability Matthews', else accuracy.",
        score_table(records, scores, tasks, methods),
        "GSOFT (two factors) minus each other method, on the same texts:",
        difference_table(scores, tasks, methods),
        "Validation scores of every learning rate that was tried, at seed 0; the chosen one is bold:",
        rate_table(records, rates, content["settings"]["sweep_tasks"]),
    ]
    (out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "gsoft", "svg.fonttype": "path"}):
        score_plot(scores, tasks, methods).savefig(out / "scores.svg", metadata={"Date": None})
    return [out / "table.md", out / "scores.svg"]


def _is_whole(records: Records, sweep_tasks: Sequence[str], rates: Mapping[str, float]) -> bool:
    """Whether every method has all sweep tasks at each of its rates, and the same tasks and seeds at the chosen one."""
    trained = [record for record in records if record["kind"] == "training"]
    swept: dict[tuple[str, float], set[str]] = defaultdict(set)
    done: dict[str, set[tuple[str, int]]] = {record["method"]: set() for record in trained}
    for record in trained:
        method, rate = record["method"], record["learning_rate"]
        if record["seed"] == 0 and record["task"] in sweep_tasks:
            swept[method, rate].add(record["task"])
        if rate == rates.get(method) and "answers" in record:
            done[method].add((record["task"], record["seed"]))
    tasks, seeds = ({record[name] for record in trained} for name in ("task", "seed"))
    return (
        bool(trained)
        and all(found == set(sweep_tasks) for found in swept.values())
        and all(found == set(product(tasks, seeds)) for found in done.values())
    )


def drawn_scores(records: Records, rates: Mapping[str, float]) -> Scores:
    """The test scores by task and method, means over the seeds.

    records: of a comparison. rates: the learning rate of each method.
    """
    truths = {record["task"]: _numbers(record["labels"]) for record in records if record["kind"] == "truth"}
    answers: dict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
    for record in records:
        if record["kind"] == "training" and record["learning_rate"] == rates[record["method"]]:
            answers[record["task"], record["method"]].append(_numbers(record["answers"]))
    return {(task, method): draw(task, np.stack(found), truths[task]) for (task, method), found in answers.items()}


def draw(task: str, answers: NDArray[np.float64], truth: NDArray[np.float64]) -> Drawn:
    """A mean score over seeds, and how it spreads.

    task: a key of `TASKS`. answers: `(seeds, N)`. truth: `(N,)`. Which texts and seeds are drawn depends on the task
    alone, so that two methods are compared on the same.
    """
    rng = np.random.default_rng(list(TASKS).index(task))
    metric = TASKS[task].metric
    draws = np.empty(DRAWS)
    for number in range(DRAWS):
        texts = rng.integers(len(truth), size=len(truth))
        seeds = rng.integers(len(answers), size=len(answers))
        draws[number] = np.mean([score(metric, answers[seed, texts], truth[texts]) for seed in seeds])
    return Drawn(float(np.mean([score(metric, row, truth) for row in answers])), draws)


def mean(scores: Sequence[Drawn]) -> Drawn:
    """The mean over tasks, draw by draw."""
    return Drawn(float(np.mean([one.value for one in scores])), np.mean([one.draws for one in scores], axis=0))


def score_table(records: Records, scores: Scores, tasks: Sequence[str], methods: Sequence[str]) -> str:
    """A row a method: what is learned, the scores, and what a step costs."""
    rows = []
    for method in methods:
        of_method = [scores[task, method] for task in tasks]
        trained = next(record for record in records if record.get("method") == method and "learned" in record)
        published = f"{trained['published']:,}" if trained["published"] else ""
        rows.append(
            [
                METHODS[method],
                f"{trained['learned']:,}",
                published,
                *map(str, of_method),
                str(mean(of_method)),
                *costs(records, method),
            ]
        )
    head = ["", "learned", "as the paper counts", *tasks, "all", "step, s", "/ LoRA", "kept, MiB"]
    return table(head, rows)


def costs(records: Records, method: str) -> list[str]:
    """Seconds a step, times LoRA's within a repetition, and kept memory, as the table has them.

    records: of a comparison. method: which.
    """
    steps = {(record["method"], record["repetition"]): record for record in records if record["kind"] == "step"}
    own = {repetition: record for (name, repetition), record in steps.items() if name == method}
    if not own:
        return ["", "", ""]
    ratios = [
        min(record["seconds"]) / min(steps["lora", repetition]["seconds"])
        for repetition, record in own.items()
        if ("lora", repetition) in steps
    ]
    kept = [record["kept_bytes"] for record in own.values() if record["kept_bytes"] is not None]
    return [
        f"{median(min(record['seconds']) for record in own.values()):.2f}",
        f"{median(ratios):.2f}" if ratios else "",
        f"{median(kept) / 2**20:.0f}" if kept else "",
    ]


def difference_table(scores: Scores, tasks: Sequence[str], methods: Sequence[str]) -> str:
    """A row a method: GSOFT's score minus the method's, for each task and over all."""
    rows = []
    for method in methods:
        if method == "gsoft" or "gsoft" not in methods:
            continue
        differences = [
            Drawn(ours.value - theirs.value, ours.draws - theirs.draws)
            for ours, theirs in ((scores[task, "gsoft"], scores[task, method]) for task in tasks)
        ]
        rows.append([METHODS[method], *map(str, differences), str(mean(differences))])
    return table(["GSOFT minus", *tasks, "all"], rows)


def rate_table(records: Records, rates: Mapping[str, float], sweep_tasks: Sequence[str]) -> str:
    """A row for each learning rate of each method, with its validation scores.

    records: of a comparison. rates: the chosen ones. sweep_tasks: the tasks that chose them.
    """
    tried = {
        (record["method"], record["learning_rate"], record["task"]): record["validation"]
        for record in records
        if record["kind"] == "training" and record["seed"] == 0
    }
    rows = []
    for method, chosen in rates.items():
        for rate in sorted({rate for name, rate, _ in tried if name == method}):
            values = [tried[method, rate, task] for task in sweep_tasks]
            shown = f"**{rate:g}**" if rate == chosen else f"{rate:g}"
            rows.append(
                [METHODS[method], shown, *("diverged" if value is None else f"{value:.1f}" for value in values)]
            )
    return table(["", "learning rate", *sweep_tasks], rows)


def score_plot(scores: Scores, tasks: Sequence[str], methods: Sequence[str]) -> Figure:
    """Scores with intervals, a panel a task and one for all."""
    figure = Figure(figsize=(2.4 * (len(tasks) + 1) + 1.6, 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks) + 1, sharey=True), [*tasks, "all"], strict=True):
        for place, method in enumerate(methods):
            shown = mean([scores[one, method] for one in tasks]) if task == "all" else scores[task, method]
            low, high = np.quantile(shown.draws, [0.025, 0.975])
            color = "#c1121f" if "gsoft" in method else "#6b6b6b" if method == "full" else "#1d6fb8"
            axes.plot([low, high], [place, place], color=color, linewidth=1.5, alpha=0.6)
            axes.plot(shown.value, place, "o", color=color)
        axes.set_title(task if task == "all" else f"{task} ({TASKS[task].metric})", fontsize=9)
        axes.set_yticks(range(len(methods)), [METHODS[method] for method in methods], fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    return figure


def _numbers(line: str) -> NDArray[np.float64]:
    return np.array(line.split(), dtype=np.float64)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=expanded_path, required=True, help="folder of a comparison")
    for path in write_report(parser.parse_args().out):
        print(path)
    return 0


if __name__ == "__main__":
    run(main)
