"""How long the page takes to be usable, and what it costs a run that it watches.

    python -m benchmarks.page --out benchmarks/results/page.json

Usable is the page when a browser shows its first field. The cost is measured in one run of the miniature: for some
steps a browser looks at the run, for as many the page's process is halted and the browser is elsewhere, in turns.
Needs chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from benchmarks.measure import file_to_write, machine, median
from gsoft_diffusion.training.progress import read_progress

PORT = 7899
ADDRESS = f"http://127.0.0.1:{PORT}/"
PHOTOS = Path(__file__).parents[1] / "data" / "subjects" / "teddy_bear"
SAID = "the page is at"


@contextmanager
def page(folder: Path) -> Iterator[tuple[subprocess.Popen[str], float]]:
    """The page's process, and the seconds until it printed its address."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "gsoft_diffusion.app", "--folder", str(folder), "--port", str(PORT)]
    with subprocess.Popen([*command, "--no_open_browser"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith(SAID):
                raise SystemExit(f"the page did not start: {line}")
            yield process, time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.stdout.read()  # its last words


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield opened
        opened.close()


def usable(folder: Path) -> dict[str, float]:
    """Seconds from the start of the process to its address, and to a browser that shows the first field."""
    with browser() as opened:
        visit = opened.new_page()
        started = time.perf_counter()
        with page(folder) as (_, address):
            visit.goto(ADDRESS)
            visit.wait_for_selector("#subject", timeout=120_000)
            return {"address": round(address, 2), "usable": round(time.perf_counter() - started, 2)}


def cost(folder: Path, steps: int, turns: int) -> dict[str, Any]:
    """Median seconds of a step with the page halted, and with a browser that watches the run."""
    settings = {
        "instance_data_dir": PHOTOS,
        "class_word": "bear",
        "output_dir": folder / "watched",
        "report_to": "none",
    }
    settings |= {"max_train_steps": 100_000, "num_validation_images": 0, "checkpointing_steps": 0}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    script = Path(__file__).parents[1] / "train_dreambooth_gsoft.py"
    with page(folder) as (process, _), browser() as opened, tempfile.TemporaryFile("w+") as said:
        visit = opened.new_page()
        run = subprocess.Popen([sys.executable, str(script), *flags], stdout=subprocess.DEVNULL, stderr=said)
        found: dict[str, list[float]] = {"halted": [], "watched": []}
        reach(folder / "watched", steps, run, said)  # past what is only slow at the beginning
        for turn in range(2 * turns):
            kind = ("halted", "watched")[turn % 2]
            if kind == "watched":
                process.send_signal(signal.SIGCONT)
                visit.goto(ADDRESS)
                visit.get_by_role("tab", name="3 Train").click()
            else:
                visit.goto("about:blank")
                process.send_signal(signal.SIGSTOP)
            first = len(read_progress(folder / "watched")) + 2
            reach(folder / "watched", first + steps - 4, run, said)
            times = [each.time for each in read_progress(folder / "watched")[first:]]
            found[kind] += [after - before for before, after in pairwise(times)]
        run.terminate()
        run.wait()
    halted, watched = (median(found[kind]) for kind in ("halted", "watched"))
    return {
        "seconds_a_step": {"halted": round(halted, 4), "watched": round(watched, 4)},
        "steps_a_second": {"halted": round(1 / halted, 3), "watched": round(1 / watched, 3)},
        "steps_measured": {kind: len(times) for kind, times in found.items()},
        "slower_by": round(watched / halted - 1, 4),
        "raw": {kind: [round(each, 4) for each in times] for kind, times in found.items()},
    }


def reach(folder: Path, step: int, run: subprocess.Popen[Any], said: IO[str]) -> None:
    """Wait until the run in the folder has done so many steps.

    run: its process. said: what that writes to stderr. Raises SystemExit with the last of it if the process ends.
    """
    while len(read_progress(folder)) < step:
        if run.poll() is not None:
            said.seek(0)
            raise SystemExit(f"the run ended with status {run.returncode}: {said.read()[-2000:]}")
        time.sleep(0.2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file to write")
    parser.add_argument("--starts", type=int, default=3, help="how often the page is started (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of the run in each turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="with and without the page (default: %(default)s)")
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": machine() | {"gradio": version("gradio")}}
    report["load_before"] = round(os.getloadavg()[0], 2)  # of other programs on the machine
    with tempfile.TemporaryDirectory() as place:
        report["starts"] = [usable(Path(place) / "outputs") for _ in range(args.starts)]
        report["cost"] = cost(Path(place) / "outputs", args.steps, args.turns)
    report["load_after"] = round(os.getloadavg()[0], 2)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(
        json.dumps(
            report | {"cost": {name: value for name, value in report["cost"].items() if name != "raw"}}, indent=1
        )
    )


if __name__ == "__main__":
    main()
