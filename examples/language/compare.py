"""Compare all methods on all tasks: learning rates first, then several seeds, then the report. One command.

    python -m examples.language.compare --model outputs/language/model --data_dir outputs/language \
        --out results/language

Every method's rate is chosen by the validation parts of two tasks with seed 0; everything is then run at that rate.
Killed at any point, the same command goes on where it stopped. Into the folder go `results.json`, with the answers to
every test text, and what `examples.language.report` makes of it: `table.md` and `scores.svg`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
from tqdm import tqdm

from benchmarks.measure import Records
from examples.language.cost import REPETITIONS, measure
from examples.language.methods import METHODS
from examples.language.report import chosen_rates, write_report
from examples.language.tasks import FETCHED, TASKS, Texts, read_task
from examples.language.training import DivergedError, Run, train, training_device
from gsoft_diffusion.config.command_line import add_flags, expanded_path, run
from gsoft_diffusion.config.settings import POSITIVE, Settings, check_rules
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import locked
from gsoft_diffusion.foundation.processes import end_with_parent

ADAPTER_RATES = (8e-4, 2e-3, 5e-3, 1.2e-2)
RATES = dict.fromkeys(METHODS, ADAPTER_RATES) | {"full": (3e-5, 1e-4, 3e-4, 1e-3)}


@dataclass(frozen=True)
class Comparison(Settings):
    """What is compared, and at which size. All methods share everything but their learning rates.

    model: encoder, a folder or a name on the hub.
    data_dir: folder that python -m examples.language.fetch has made; GLUE's tasks need none.
    tasks: which tasks; by default the fetched ones.
    sweep_tasks: the tasks whose validation parts choose each method's learning rate.
    methods: which methods; by default all.
    seeds: how often everything is trained, with seeds 0, 1, 2, …
    max_steps: optimizer steps.
    evaluations: how often the validation part is answered, at distances that are equal but for one step, the last time
      at the end; the best of these steps is kept.
    batch_size: texts in a batch.
    max_length: tokens of a text; what is longer is cut.
    bf16: compute in bfloat16 where that is safe.
    """

    model: str
    data_dir: str | None = None
    tasks: tuple[str, ...] = tuple(FETCHED)
    sweep_tasks: tuple[str, ...] = ("sentiment", "rating")
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: Annotated[int, POSITIVE] = 3
    max_steps: int = 160
    evaluations: int = 8
    batch_size: int = 32
    max_length: int = 32
    bf16: bool = True

    def __post_init__(self) -> None:
        check_rules(self)
        for name, known in (("tasks", TASKS), ("methods", METHODS)):
            if unknown := set(getattr(self, name)) - known.keys():
                raise UserError(f"--{name} {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        if not self.sweep_tasks or set(self.sweep_tasks) - set(self.tasks):
            raise UserError(f"--sweep_tasks {', '.join(self.sweep_tasks)}: must be one or more of --tasks")

    def run(self, task: str, method: str, learning_rate: float, seed: int) -> Run:
        """The settings of one training.

        task, method, learning_rate, seed: in which trainings differ.
        """
        shared = {name: getattr(self, name) for name in SHARED}
        return Run(task=task, method=method, learning_rate=learning_rate, seed=seed, **shared)


SHARED = ("model", "data_dir", "max_steps", "evaluations", "batch_size", "max_length", "bf16")  # by all trainings


def compare(comparison: Comparison, out: Path, workers: int = 1) -> None:
    """Train what is not trained yet, measure what a step costs, and write the report.

    comparison: the settings. out: the folder for results. workers: trainings at a time, each in a process of its own.
    Raises UserError if the folder holds results of other settings, another process compares there, a task or the model
    is not available, or a training diverges at the chosen rate.
    """
    try:
        with locked(out):
            _compare(comparison, out, workers)
    except BlockingIOError as error:
        raise UserError(f"--out {out}: {error} is at work there; wait for it, or choose another folder") from error


def _compare(comparison: Comparison, out: Path, workers: int) -> None:
    settings = {name: getattr(comparison, name) for name in SHARED} | {"sweep_tasks": list(comparison.sweep_tasks)}
    try:
        records = Records(out / "results.json", settings, training_device())
    except SystemExit as error:  # of other settings
        raise UserError(str(error)) from error
    parts = {task: read_task(task, comparison.data_dir) for task in comparison.tasks}
    sweep = [
        comparison.run(task, method, rate, 0)
        for task in comparison.sweep_tasks
        for method in comparison.methods
        for rate in RATES[method]
    ]
    _run_cells(records, parts, sweep, workers)
    rates = chosen_rates(records.records, comparison.sweep_tasks)
    if lost := [method for method in comparison.methods if method not in rates]:
        raise UserError(
            f"every learning rate diverged for {', '.join(lost)}; lower its RATES in examples/language/compare.py"
        )
    cells = [
        comparison.run(task, method, rates[method], seed)
        for seed in range(comparison.seeds)
        for task in comparison.tasks
        for method in comparison.methods
    ]
    _run_cells(records, parts, cells, workers)
    for one in cells:
        if records.has(kind="training", **_key(one), validation=None):
            raise UserError(
                f"{one.method} diverged on {one.task} with seed {one.seed}, at the rate that was best in the sweep; "
                "lower its RATES in examples/language/compare.py, and compare anew"
            )
    _measure_steps(records, comparison)
    for path in write_report(out):
        print(path)


def _run_cells(records: Records, parts: Mapping[str, Mapping[str, Texts]], runs: Iterable[Run], workers: int) -> None:
    missing = [one for one in runs if not records.has(kind="training", **_key(one))]
    if not missing:
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (threads,)) as pool:
        trainings = [pool.submit(_scores, one, parts[one.task]) for one in missing]
        try:
            for training in tqdm(as_completed(trainings), total=len(missing), unit="training"):
                scores, truth = training.result()
                if truth and not records.has(kind="truth", task=scores["task"]):
                    records.add(kind="truth", task=scores["task"], labels=truth)
                records.add(kind="training", **scores)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


def _scores(one: Run, parts: Mapping[str, Texts]) -> tuple[dict[str, Any], str | None]:
    """What is recorded of a training, and the labels of the test part."""
    try:
        trained = train(one, parts, progress=False)
    except DivergedError:
        return _key(one) | {"validation": None}, None
    scores = dict(trained.scores)
    truth = _in_a_line(scores.pop("truth"))
    scores["answers"] = _in_a_line(scores["answers"])
    sizes = {"learned": trained.adapted.learned, "published": trained.adapted.published}
    return _key(one) | sizes | scores, truth


def _measure_steps(records: Records, comparison: Comparison) -> None:
    wanted = [
        (repetition, method)
        for repetition in range(REPETITIONS)
        for method in comparison.methods
        if not records.has(kind="step", repetition=repetition, method=method)
    ]
    for repetition, method in tqdm(wanted, desc="steps", unit="method"):
        one = comparison.run(comparison.tasks[0], method, RATES[method][0], 0)
        records.add(kind="step", repetition=repetition, method=method, **measure(one))


def _key(one: Run) -> dict[str, Any]:
    return {"task": one.task, "method": one.method, "learning_rate": one.learning_rate, "seed": one.seed}


def _in_a_line(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Comparison)
    parser.add_argument("--out", type=expanded_path, required=True, help="folder for the results")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time (default: 1)")
    flags = vars(parser.parse_args())
    out, workers = flags.pop("out"), flags.pop("workers")
    if "model" not in flags:
        parser.error("give --model")
    if workers < 1:
        raise UserError(f"--workers {workers}: must be 1 or more")
    compare(Comparison.from_dict(flags, "options"), out, workers)
    return 0


if __name__ == "__main__":
    run(main)
