"""What a GPU makes of it: the device tests, then steps, peak memory and sampling of every method, in a stated time.

benchmarks/gpu.sh

Stable Diffusion 1.5's and SDXL's UNets with random weights in bfloat16, batches of 1 and 4, compiled by torch.compile
and not. The parts are run one after the other, each in a process of its own, the most telling first; what the time does
not allow is left out and named. Run with the same --out again, it goes on where it was. Writes `gpu.json` and `gpu.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.bases import BASES, device
from benchmarks.measure import machine, median, table
from gsoft_diffusion.config.command_line import expanded_path

METHODS = {  # as `benchmarks.step` and `benchmarks.sampling` call them
    "floor": ("base", "frozen: only the attentions' output biases train"),
    "lora": ("lora", "LoRA (PEFT)"),
    "oft": ("oft", "OFT v2 (PEFT)"),
    "boft": ("boft", "BOFT"),
    "double_gsoft": ("unmerged", "Double GSOFT"),
}
TELLING = ("double_gsoft", "lora", "floor", "oft", "boft")  # in which order they are compiled, which takes long
TITLES = {"sd15": "Stable Diffusion 1.5, 512 px", "sdxl": "SDXL, 1024 px", "mini": "the miniature base"}
TESTS_SECONDS = 150  # at most, of all the time
GRACE = 5  # seconds for a process to end by itself, and to write what it has


@dataclass(frozen=True)
class Part:
    """One process that measures: `benchmarks.step` or `benchmarks.sampling` for one base, batch, and way of running."""

    module: str
    base: str
    batch: int
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.module}_{self.base}_batch{self.batch}{'_compiled' if self.compiled else ''}"

    @property
    def title(self) -> str:
        what = {"step": "training steps", "sampling": "sampling"}[self.module]
        return f"{what}, {TITLES[self.base]}, batch {self.batch}{', compiled' if self.compiled else ''}"

    def command(self, on: torch.device, out: Path, steps: int) -> list[str]:
        """The process that writes its measurements to `out` as they come."""
        command = [sys.executable, "-m", f"benchmarks.{self.module}", "--base", self.base, "--batch", str(self.batch)]
        command += ["--device", str(on), "--out", str(out), "--repetitions", "1"]
        command += ["--compile"] if self.compiled else []
        order = TELLING if self.compiled else tuple(METHODS)
        if self.module == "step":
            return [*command, "--steps", str(steps), "--methods", *order]
        return [*command, "--states", *(METHODS[method][0] for method in order), "merged"]

    def missing(self, records: Sequence[dict[str, Any]]) -> list[str]:
        """The methods that the records do not have."""
        if self.module == "sampling":
            return [] if records else list(METHODS)
        return [method for method in METHODS if all(record["method"] != method for record in records)]


def parts(bases: Sequence[str], batches: Sequence[int]) -> list[Part]:
    """All that is measured, the most telling first: small batches; what compiles, which takes minutes, comes last."""
    steps = [Part("step", base, batch, compiled=False) for batch in batches for base in bases]
    sampling = [Part("sampling", base, batch, compiled=False) for batch in batches for base in bases]
    compiled = [Part(part.module, part.base, part.batch, compiled=True) for part in (*steps, *sampling)]
    first, others = slice(len(bases)), slice(len(bases), None)
    return [*steps[first], *sampling[first], *steps[others], *sampling[others], *compiled]


class Budget:
    """The time that there is, from the start of this process, imports included."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._started = seconds, psutil.Process().create_time()

    @property
    def left(self) -> float:
        return self.seconds - (time.time() - self._started)

    def say(self, what: str) -> None:
        """Print what is done now, and how much of the time has passed."""
        passed = self.seconds - self.left
        print(f"[{_minutes(passed)} of {_minutes(self.seconds)}] {what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="the time that there is; it is kept")
    parser.add_argument("--out", type=expanded_path, help="folder of the results; outputs/gpu-<date> unless given")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["sd15", "sdxl"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--device", default="cuda", help="cpu to try this command itself")
    args = parser.parse_args()
    budget = Budget(60 * args.minutes)
    if args.device != "cpu" and (why := why_no_gpu()):
        print(f"error: {why}", file=sys.stderr)
        return 2
    try:
        on = device(args.device)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    out: Path = args.out or Path("outputs") / f"gpu-{datetime.now():%Y%m%d-%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": machine(on) | {"python": platform.python_version()}, "parts": []}
    if on.type == "cuda":
        print(_card(content["machine"]["gpu"]))
    budget.say("device tests")
    content["tests"] = run_tests(out / "tests.xml", min(TESTS_SECONDS, budget.left))
    for part in parts(args.bases, args.batches):
        path = out / "parts" / f"{part.name}.json"
        ended = "no time was left"
        if budget.left > 0 and part.missing(_records(path)):
            budget.say(part.title)
            ended = run(part.command(on, path, args.steps), budget.left)
        records = _records(path)
        missing = part.missing(records)
        content["parts"].append(vars(part) | {"records": records, "missing": missing, "why": ended if missing else ""})
        write(out, content)
    print(report(content))
    budget.say(f"done: {out / 'gpu.json'} and {out / 'gpu.md'}")
    return 0


def why_no_gpu() -> str | None:
    """Why nothing can be measured on a GPU here, and what to do, in words; None if there is one."""
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA; install a build with it (https://pytorch.org), "
            "or give --device cpu to try the command itself"
        )
    if not torch.cuda.is_available():
        return (
            "PyTorch finds no GPU; check that `nvidia-smi` lists one, and that its driver is new enough for "
            f"CUDA {torch.version.cuda}"
        )
    return None


def run_tests(report_path: Path, seconds: float) -> dict[str, Any]:
    """Run the device tests, for at most so long. Returns how many passed, which failed or were skipped, how it ended.

    report_path: the JUnit XML that pytest writes.
    """
    report_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/device", "-q", "-m", "gpu", f"--junitxml={report_path}"]
    ended = run(command, seconds)
    if not report_path.exists():
        return {"passed": 0, "failed": [], "skipped": [], "ended": ended or "pytest wrote no report"}
    return _outcomes(report_path) | {"ended": ended}


def _outcomes(path: Path) -> dict[str, Any]:
    failed, skipped, passed = [], [], 0
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            skipped.append([name, skip.get("message")])
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def run(command: Sequence[str], seconds: float) -> str:
    """Run a process, whose output goes to the terminal, for at most so long. Returns how it ended, "" if well."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest writes then what it has found so far
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        _end(process)
        return "the time was over"
    except BaseException:
        _end(process)
        raise
    return f"ended with exit status {code}; see its message" if code else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """With its own processes: compilers, above all."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _records(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["records"] if path.exists() else []


def write(out: Path, content: dict[str, Any]) -> None:
    """Write what is known so far."""
    (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(report(content) + "\n", encoding="utf-8")


def report(content: dict[str, Any]) -> str:
    """The tables in Markdown, and in words what is missing."""
    return "\n\n".join(_sections(content))


def _sections(content: dict[str, Any]) -> Iterator[str]:
    here = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    yield (
        f"{_card(here['gpu']) if 'gpu' in here else here['processor']}; {versions}. "
        "Steps are the fastest of a few; `peak` is the most that tensors held during forward and backward pass."
    )
    tests = content["tests"]
    counts = f"{tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} were skipped"
    yield f"Device tests: {counts}{'; ' + tests['ended'] if tests['ended'] else ''}."
    lines = [f"- failed: {name}" for name in tests["failed"]]
    reasons = Counter(why for _, why in tests["skipped"])
    lines += [f"- skipped: {count}, {why}" for why, count in reasons.items()]
    if lines:
        yield "\n".join(lines)
    for base, batch in dict.fromkeys((part["base"], part["batch"]) for part in content["parts"]):
        found = [part for part in content["parts"] if (part["base"], part["batch"]) == (base, batch)]
        yield f"**{TITLES[base]}, batch {batch}**"
        yield _table({(part["module"], part["compiled"]): part["records"] for part in found})
    lines = [_left_out(part) for part in content["parts"] if part["missing"]]
    if lines:
        yield "Not measured:"
        yield "\n".join(f"- {line}" for line in lines)


def _card(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}, CUDA {gpu['cuda']}"


def _left_out(part: dict[str, Any]) -> str:
    title = Part(*(part[name] for name in ("module", "base", "batch", "compiled"))).title
    names = ", ".join(METHODS[method][1] for method in part["missing"])
    return f"{title}: {'all' if len(part['missing']) == len(METHODS) else names}, since {part['why']}"


def _table(records: dict[tuple[str, bool], list[dict[str, Any]]]) -> str:
    """Methods in rows; steps, peak and sampling, not compiled and compiled, in columns."""
    rows = []
    for method, (state, title) in METHODS.items():
        cells = [title]
        for compiled in (False, True):
            steps = {record["method"]: record for record in records.get(("step", compiled), [])}
            cells += _step_cells(steps, method)
        for compiled in (False, True):
            cells += _sampling_cells(records.get(("sampling", compiled), []), state)
        rows.append(cells)
    merged = ["Double GSOFT, merged", *[""] * 6]
    for compiled in (False, True):
        merged += _sampling_cells(records.get(("sampling", compiled), []), "merged")
    rows.append(merged)
    training = ["step, ms", "/ LoRA", "peak, MiB", "compiled, ms", "/ LoRA", "peak, MiB"]
    return table(["", *training, "call, ms", "/ base", "compiled, ms", "/ base"], rows)


def _step_cells(steps: dict[str, dict[str, Any]], method: str) -> list[str]:
    if method not in steps:
        return ["", "", ""]
    record, lora = steps[method], steps.get("lora", {})
    if "error" in record:
        return [record["error"], "", ""]
    ratio = f"{min(record['seconds']) / min(lora['seconds']):.2f}" if "seconds" in lora else ""
    return [f"{1000 * min(record['seconds']):,.1f}", ratio, f"{(record['peak_bytes'] or 0) / 2**20:,.0f}"]


def _sampling_cells(records: Iterable[dict[str, Any]], state: str) -> list[str]:
    found = [record["seconds"] for record in records if state in record["seconds"]]
    if not found:
        return ["", ""]
    return [
        f"{1000 * median(seconds[state] for seconds in found):,.1f}",
        f"{median(seconds[state] / seconds['base'] for seconds in found):.2f}",
    ]


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
