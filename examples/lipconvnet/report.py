"""Tables and a plot from a comparison's results.

python -m examples.lipconvnet.report results/lipconvnet
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measure import quartiles, table
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.foundation.errors import UserError

# Student's t at 97.5 % for 1, 2 … degrees of freedom.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
SCORES = (  # part, score, and what tables call it
    ("test", "accuracy", "accuracy"),
    ("test", "certified", "certified"),
    ("test", "attacked_accuracy", "attacked"),
    ("familiar", "accuracy", "accuracy, familiar"),
    ("familiar", "certified", "certified, familiar"),
)

SETTINGS, STEPS, RUNS = "settings.json", "step_seconds.json", "runs"  # in a comparison's folder

Record = dict[str, Any]


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lipconvnet.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=expanded_path, help="folder that examples.lipconvnet.compare wrote to")
    args = parser.parse_args()
    print(write_report(args.out))
    return 0


def write_report(out: Path) -> Path:
    """Write `report.md` and `accuracy.png` into the folder that has the runs' files; returns the first.

    Raises UserError if the folder has no whole comparison.
    """
    results = read_results(out)
    path = out / "report.md"
    path.write_text(f"{report(results)}\n")
    accuracy_plot(results).savefig(out / "accuracy.png", dpi=110)
    return path


def read_results(out: Path) -> Record:
    """Settings, step times, and the runs of all seeds from which every kind of network was trained.

    Raises UserError if the folder has no such results.
    """
    try:
        settings, steps = (json.loads((out / name).read_text()) for name in (SETTINGS, STEPS))
        runs = [json.loads(path.read_text()) for path in sorted((out / RUNS).glob("*.json"))]
    except (OSError, ValueError) as error:
        raise UserError(f"{out} has no whole comparison: {error}") from None
    order = list(steps["seconds"])
    seeds = {run["seed"] for run in runs}
    whole = {seed for seed in seeds if sum(run["seed"] == seed for run in runs) == len(order)}
    if not whole:
        raise UserError(f"{out} has no seed from which every kind of network was trained")
    found = sorted(
        (run for run in runs if run["seed"] in whole), key=lambda run: (order.index(run["name"]), run["seed"])
    )
    return {"settings": settings, "step_seconds": steps["seconds"], "runs": found}


def report(results: Record) -> str:
    """The tables as Markdown; results: as `read_results` gives them."""
    names = list(dict.fromkeys(record["name"] for record in results["runs"]))
    settings = results["settings"]
    parts = [
        f"LipConvnet-{settings['depth']}, width {settings['width']}, {settings['epochs']} epochs, "
        f"{len({record['seed'] for record in results['runs']})} seeds. Percent: mean over the seeds, in brackets "
        "the difference from SOC with the same seed and its 95 % interval (Student's t). Accuracies are of the "
        "epoch that was best on the validation part.",
        main_table(results, [name for name in names if "not paired" not in name]),
        paired_table(results, [name for name in names if name != "SOC"]),
    ]
    attacked = [record["scores"]["test"] for record in results["runs"]]
    if attacked[0]["attacked"]:
        parts.append(
            f"Attack: projected gradient descent within 36/255, {settings['attack_steps']} steps, on "
            f"{attacked[0]['attacked']} test pictures of each network. Certified pictures that it had named otherwise: "
            f"{sum(scores['beaten'] for scores in attacked)} of "
            f"{sum(round(scores['attacked_certified'] * scores['attacked']) for scores in attacked)}."
        )
    return "\n\n".join(parts)


def main_table(results: Record, names: Sequence[str]) -> str:
    """The paper's Table 3: parameters, a step's time over SOC's, accuracies."""
    scores = _scores(results)
    header = ["groups", "numbers learned", "as the paper counts", "step over SOC's", *(title for *_, title in scores)]
    rows = []
    for name in names:
        record = _runs(results, name)[0]
        low, middle, high = step_ratio(results, name)
        row = [name, f"{record['learned_numbers']:,}", f"{record['parameters_as_in_paper']:,}"]
        row.append("1" if name == "SOC" else f"{middle:.2f} ({low:.2f} to {high:.2f})")
        for part, score, _ in scores:
            mean = f"{100 * statistics.mean(_values(results, name, part, score)):.1f}"
            row.append(mean if name == "SOC" else f"{mean} ({difference(results, name, 'SOC', part, score)})")
        rows.append(row)
    return table(header, rows)


def paired_table(results: Record, names: Sequence[str]) -> str:
    """The paper's Table 4: what shuffling channels in pairs is good for."""
    scores = [score for score in _scores(results) if score[1] != "attacked_accuracy"]
    rows = [
        [name, *(difference(results, name, f"{name} not paired", part, score) for part, score, _ in scores)]
        for name in names
        if f"{name} not paired" in names
    ]
    return "Paired minus not paired:\n\n" + table(["groups", *(title for *_, title in scores)], rows)


def difference(results: Record, name: str, other: str, part: str, score: str) -> str:
    """The mean difference of two kinds of network with the same seed in percentage points, and its 95 % interval."""
    pairs = zip(_values(results, name, part, score), _values(results, other, part, score), strict=True)
    found = [100 * (mine - its) for mine, its in pairs]
    mean = statistics.mean(found)
    if len(found) == 1:
        return f"{mean:+.1f}"
    half = STUDENT_T[min(len(found) - 1, len(STUDENT_T)) - 1] * statistics.stdev(found) / math.sqrt(len(found))
    return f"{mean:+.1f}, {mean - half:+.1f} to {mean + half:+.1f}"


def step_ratio(results: Record, name: str) -> tuple[float, float, float]:
    """Quartiles of a step's time over that of SOC, which was measured next to it."""
    seconds = results["step_seconds"]
    ratios = [mine / soc for mine, soc in zip(seconds[name], seconds["SOC"], strict=True)]
    return quartiles(ratios)


def accuracy_plot(results: Record) -> Figure:
    """Accuracy and certified accuracy of each kind of network, a mark for each seed."""
    names = list(dict.fromkeys(record["name"] for record in results["runs"]))
    parts = list(results["runs"][0]["scores"])
    figure = Figure(figsize=(5 * len(parts), 4.2), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for panel, part in zip(panels, parts, strict=True):
        for score, color in (("accuracy", "C0"), ("attacked_accuracy", "C1"), ("certified", "C2")):
            if (part, score) not in [(its_part, its_score) for its_part, its_score, _ in _scores(results)]:
                continue
            means = [100 * statistics.mean(_values(results, name, part, score)) for name in names]
            panel.plot(means, range(len(names)), "|", color=color, markersize=14, label=score.replace("_", " "))
            for row, name in enumerate(names):
                values = [100 * value for value in _values(results, name, part, score)]
                panel.plot(values, [row] * len(values), ".", color=color, alpha=0.6)
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set(xlabel="% of pictures", title={"test": "test", "familiar": "familiar things"}[part])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _runs(results: Record, name: str) -> list[Record]:
    """The runs of a kind of network, by seed."""
    return [record for record in results["runs"] if record["name"] == name]


def _values(results: Record, name: str, part: str, score: str) -> list[float]:
    return [record["scores"][part][score] for record in _runs(results, name)]


def _scores(results: Record) -> list[tuple[str, str, str]]:
    """The scores that these results have: CIFAR-100 has no part of familiar things, and `--attacked 0` no attack."""
    found = results["runs"][0]["scores"]
    return [
        (part, score, title)
        for part, score, title in SCORES
        if part in found and (score != "attacked_accuracy" or found[part]["attacked"])
    ]


if __name__ == "__main__":
    run(main)
