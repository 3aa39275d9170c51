"""What engines cost and bring: seconds that each adds to a cell, and cells an hour by the number of workers.

    python -m benchmarks.engines --engines local --out /tmp/engines.json

On clusters of this machine:

    python tests/cluster/here.py --engines ray submitit -- python -m benchmarks.engines

Engines take turns, so that what else the machine does meanwhile concerns all of them; the load is recorded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measure import Records, file_to_write, median, table
from eval.cells import Cell
from eval.engines import ENGINES
from eval.engines.worker import Workers
from eval.experiment import Experiment
from eval.results import CELL_RESULT, cell_folder

EXPERIMENT: dict[str, Any] = {  # on the miniature: eight steps, and a picture for each of a few prompts
    "subjects": ["teddy_bear"],
    "clip": "data/mini_clip",
    "dino": "data/mini_dino",
    "prompts": "eval/experiments/mini_prompts.txt",
    "max_train_steps": 8,
    "train_batch_size": 2,
    "images_per_prompt": 1,
    "max_prompts": 2,
    "base_images": 1,
    "class_images": 1,
    "unrelated_images": 1,
    "sampler": {"num_inference_steps": 6},
}
KINDS = {"overhead": "cells that are done already", "cells": "cells of the experiment"}


def measure(engine: str, kind: str, workers: int, number: int) -> float:
    """Seconds that an engine takes for cells in an empty folder.

    engine: a key of `ENGINES`. kind: of `KINDS`. workers: cells at a time, on one core each. number: of cells.
    """
    experiment = Experiment.from_dict(EXPERIMENT).anchored()
    cells = [Cell("lora", "small", 1e-3, experiment.subjects[0], seed) for seed in range(number)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if kind == "overhead":
            for cell in cells:
                cell_folder(cell, out).mkdir(parents=True)
                (cell_folder(cell, out) / CELL_RESULT).write_text("{}")
        started = time.perf_counter()
        ENGINES[engine](experiment, cells, out, Workers(workers, 1))
        return time.perf_counter() - started


def in_a_process(call: Callable[..., float], *arguments: Any) -> float:
    """What the call returns in a process of its own, which has imported everything and started no engine."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(call, *arguments).result()


def measure_all(records: Records, engines: Sequence[str], workers: Sequence[int], number: int, rounds: int) -> None:
    """Measure what the records lack; engines take turns in every round.

    Of cells that have nothing to do, one alone is measured as well: so a start is told from what every cell costs.
    """
    plans = [("overhead", 1, 1), ("overhead", 1, number), *(("cells", count, number) for count in workers)]
    for turn in range(rounds):
        for kind, count, cells in plans:
            for engine in engines:
                key = {"round": turn, "kind": kind, "workers": count, "engine": engine, "cells": cells}
                if not records.has(**key):
                    load = os.getloadavg()[0]
                    seconds = in_a_process(measure, engine, kind, count, cells)
                    records.add(**key, seconds=round(seconds, 4), load_before=round(load, 1))


def tables(records: Records) -> str:
    """The two tables, in Markdown: medians over the rounds."""

    def seconds(**key: Any) -> float:
        return median(record["seconds"] for record in records.records if key.items() <= record.items())

    engines = list(dict.fromkeys(record["engine"] for record in records.records))
    counts = sorted({record["workers"] for record in records.records if record["kind"] == "cells"})
    number = max(record["cells"] for record in records.records)
    overhead, rows = [], []
    for engine in engines:
        first, several = (seconds(kind="overhead", engine=engine, cells=cells) for cells in (1, number))
        overhead.append([engine, f"{first:.1f}", f"{(several - first) / (number - 1):.1f}"])
        rates = [3600 * number / seconds(kind="cells", engine=engine, workers=count) for count in counts]
        local = [3600 * number / seconds(kind="cells", engine=engines[0], workers=count) for count in counts]
        rows.append([engine, *(f"{rate:.0f} ({rate / base:.2f})" for rate, base in zip(rates, local, strict=True))])
    return "\n\n".join(
        [
            "Seconds for cells that have nothing to do, one at a time:",
            table(["engine", "the first, with the engine's start", "each further one"], overhead),
            f"Cells an hour, and in brackets as a share of those of {engines[0]}:",
            table(["engine", *(f"{count} at a time" for count in counts)], rows),
        ]
    )


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, default=Path("benchmarks/results/engines.json"), help="raw output")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="which to measure")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="cells at a time")
    parser.add_argument("--cells", type=int, default=4, help="how many a measurement has, 2 or more")
    parser.add_argument("--rounds", type=int, default=2, help="how often everything is measured")
    args = parser.parse_args()
    if args.cells < 2:
        parser.error("--cells: must be 2 or more")
    records = Records(args.out, {"experiment": EXPERIMENT, "cores_each": 1})
    measure_all(records, args.engines, args.workers, args.cells, args.rounds)
    print(tables(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
