"""What tests of the page share: waiting for jobs, and runs' folders written by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gsoft_diffusion.app.jobs import Job, Jobs

PATIENCE = 240  # seconds for what takes a few on a quiet machine


def until(there: Callable[[], Any], what: str) -> Any:
    """Wait for something to be so."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := there():
            return found
        time.sleep(0.1)
    raise AssertionError(f"there is no {what} after {PATIENCE} s")


def ended(jobs: Jobs, job: Job) -> Job:
    """The job once it has ended, and what waited for it has begun."""

    def now() -> Job | None:
        jobs.advance()
        found = jobs.job(job.number)
        return found if found.ended else None

    found = until(now, "end of the job")
    jobs.advance()  # it may have ended between the last two looks
    return found


def write_run(folder: Path, lines: str = "", settings: str = "instance_data_dir: x\nclass_word: dog\n") -> Path:
    """A run's folder with settings and progress, written by hand."""
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(settings)
    (folder / "progress.jsonl").write_text(lines)
    return folder
