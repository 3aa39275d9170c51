"""The queue of jobs, in the page's folder: it survives the page. Each job runs as a process of its own.

A job is a command of this project with settings in a file. One that needs the device waits for its turn; exports, to
which no GPU is shown, have a turn of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import psutil
import yaml

from gsoft_diffusion.app.job import END, JOB, LOG, PROCESS, SETTINGS
from gsoft_diffusion.app.workspace import Workspace, read_json, write_json
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.files import locked

Kind = Literal["train", "draw", "export"]
State = Literal["waiting", "running", "done", "stopped", "failed", "lost", "withdrawn"]
TURNS: dict[str, str] = {"train": "device", "draw": "device", "export": "cpu"}
WITHDRAWN = "withdrawn"
STOP = "stop.json"  # in a job's folder, once it was asked to stop
HEAD, TAIL = 10_000, 20_000  # bytes of a log's beginning and end that are looked at
EVERY = 0.5  # seconds between looks at the queue
GRACE = 10.0  # seconds that a job has to end when it must not go on
PROCESS_FOLDER = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """A job as its folder says.

    run: the name of the run that it is about. state: `lost` is a process that ended without a word, as when it was
    killed or the machine was switched off. place: how many jobs it waits for; 0 unless it waits. started: when its
    process was, in seconds since 1970; None unless it runs. stopping: whether it runs and was asked to end.
    """

    folder: Path
    kind: Kind
    run: str
    state: State
    pid: int | None = None
    place: int = 0
    started: float | None = None
    stopping: bool = False

    @property
    def number(self) -> str:
        """The job's number in the queue."""
        return self.folder.name

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in ("waiting", "running")

    def settings(self) -> dict[str, Any]:
        """What it was told. Raises UserError if its file cannot be read."""
        return read_yaml(self.folder / SETTINGS)

    def lines(self) -> list[str]:
        """The first and the last lines of what it printed, each as a terminal would show it in the end."""
        try:
            with (self.folder / LOG).open("rb") as file:
                head = file.read(HEAD)
                file.seek(max(HEAD, file.seek(0, os.SEEK_END) - TAIL))
                text = (head + file.read()).decode(errors="replace")
        except OSError:
            return []
        lines = [line.rstrip("\r").rpartition("\r")[2].strip() for line in text.split("\n")]
        return [line for line in lines if line]

    def error(self) -> str:
        """What went wrong, in a line; "" if nothing did."""
        if self.state not in ("failed", "lost"):
            return ""
        lines = self.lines()
        said = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
        last = f"; the last it said: {lines[-1]}" if lines else ""
        lost = "its process ended without a word, as when memory runs out or the machine is switched off"
        unsaid = lost if self.state == "lost" else "it ended unexpectedly"
        return said or unsaid + last

    def silent_for(self, *files: Path) -> float:
        """Seconds since it printed something, or wrote to one of the files."""
        times = []
        for path in (self.folder / LOG, self.folder / JOB, *files):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return time.time() - max(times, default=time.time())


class Jobs:
    """The queue. Only one page may use a folder's at a time."""

    def __init__(self, workspace: Workspace) -> None:
        """workspace: the page's folder, whose queue goes on where it was."""
        self.workspace = workspace
        self._lock = threading.RLock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: dict[str, Job] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="queue", daemon=True)

    def start(self) -> None:
        """Begin to run what waits, and delete the rest of what was being deleted when the page ended."""
        for rest in self.workspace.deleted.iterdir():
            shutil.rmtree(rest, ignore_errors=True)
        self._thread.start()

    def close(self) -> None:
        """Start no more jobs. Those that run go on."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, kind: Kind, run: str, settings: Mapping[str, Any]) -> Job:
        """Put a job at the end of the queue.

        kind: which command. run: the name of the run that it is about. settings: the command's, as in a YAML file.

        Raises UserError if it cannot be written.
        """
        with self._lock:
            folder = self.workspace.jobs / f"{max((int(path.name) for path in self._folders()), default=0) + 1:04d}"
            try:
                folder.mkdir()
                text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
                (folder / SETTINGS).write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror}") from error
            write_json(folder / JOB, {"kind": kind, "run": run, "added": time.time()})
            self.advance()
            return self.job(folder.name)

    def all(self) -> list[Job]:
        """All jobs, in the order in which they were asked for."""
        with self._lock:
            found, waiting = [], dict.fromkeys(TURNS.values(), 0)
            for folder in self._folders():
                job = self._ended.get(folder.name) or self._read(folder, waiting)
                if job is None:
                    continue
                if job.ended:
                    self._ended[folder.name] = job
                else:
                    waiting[TURNS[job.kind]] += 1
                found.append(job)
            return found

    def job(self, number: str) -> Job:
        """The job of that number. Raises UserError if there is none."""
        found = next((job for job in self.all() if job.number == number), None)
        if found is None:
            raise UserError(f"there is no job {number}")
        return found

    def about(self, run: str, kind: Kind) -> list[Job]:
        """All jobs of a kind about a run, in the order in which they were asked for."""
        return [job for job in self.all() if job.run == run and job.kind == kind]

    def current(self, run: str, kind: Kind) -> Job | None:
        """The job of a kind about a run that is under way or the next, else the last one; None if there was none."""
        found = self.about(run, kind)
        return next((job for job in found if not job.ended), found[-1] if found else None)

    def stop(self, job: Job, at_once: bool = False) -> bool:
        """Have a job end: one that runs saves what it has, one that waits leaves the queue.

        at_once: it may not save first, and is killed if it has not ended after `GRACE`. Returns False if it was asked
        before, and is left to end by itself.
        """
        with self._lock:
            job = self.job(job.number)
            if job.state == "waiting":
                write_json(job.folder / END, {"status": WITHDRAWN, "time": time.time()})
            elif job.state == "running":
                if job.stopping and not at_once:
                    return False  # a training takes a second signal for a wish to end without saving
                if not read_json(job.folder / STOP).get("at_once"):  # another press gives it no more time
                    write_json(job.folder / STOP, {"time": time.time(), "at_once": at_once})
                self._send(job, signal.SIGTERM)
            return True

    def draw_now(self, job: Job) -> None:
        """Ask a training for a sheet of its validation prompts after the current step.

        job: one that has done a step since it was started; a process that does not listen yet would end.
        """
        if job.state == "running":
            self._send(job, signal.SIGUSR1)

    def delete(self, folder: Path) -> None:
        """Delete the folder of a subject or a run. The jobs about it stay in the queue, so that none gets its name.

        folder: in the page's folder, without links in its path.

        Raises UserError if a job that has not ended names something in it, if a command trains into it, or if it cannot
        be deleted.
        """
        with self._lock:
            jobs = self.all()
            for job in jobs:
                if not job.ended and _needs(job, folder):
                    raise UserError(
                        f"{folder.name}: is needed by {job.run}, which runs or waits ({job.kind}); stop that first"
                    )
            place = self.workspace.deleted / uuid4().hex
            try:
                with locked(folder):
                    folder.rename(place)  # gone as a whole, before files go one by one
            except BlockingIOError as error:
                raise UserError(f"{folder.name}: {error} is writing to it; wait until that has ended") from error
            except OSError as error:
                raise UserError(f"{folder.name}: cannot be deleted ({error.strerror})") from error
            for job in jobs:
                if job.ended and self.workspace.root / job.run == folder:
                    write_json(job.folder / END, {"status": WITHDRAWN, "time": time.time()})
                    self._ended.pop(job.number, None)
        try:
            shutil.rmtree(place)
        except OSError as error:
            raise UserError(
                f"{folder.name}: a part of it cannot be deleted ({error.strerror}); it is in {place}"
            ) from error

    def advance(self) -> None:
        """Start what has its turn."""
        with self._lock:
            for child in self._children.values():
                child.poll()  # so that none that has ended stays a zombie
            jobs = self.all()
            for job in jobs:
                if job.stopping:
                    self._kill_late(job)
            for turn in dict.fromkeys(TURNS.values()):
                open_jobs = [job for job in jobs if not job.ended and TURNS[job.kind] == turn]
                if open_jobs and all(job.state == "waiting" for job in open_jobs):
                    self._start(open_jobs[0])

    def _watch(self) -> None:
        said = ""
        while not self._closing.wait(EVERY):
            try:
                self.advance()
            except Exception as error:  # a full disk, a folder that is gone: whatever it is, it is tried again
                why = first_line(error)
                if why != said:
                    with suppress(OSError):  # nobody may be listening any more
                        print(f"note: the queue cannot start what waits ({why}); it tries again", file=sys.stderr)
                said = why

    def _folders(self) -> list[Path]:
        """The jobs' folders by number."""
        found = [path for path in self.workspace.jobs.iterdir() if path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))

    def _read(self, folder: Path, before: Mapping[str, int]) -> Job | None:
        """The job of a folder, None if its file does not say what it is: it is being written, or was damaged."""
        facts, process = (read_json(folder / name) for name in (JOB, PROCESS))
        alive = _alive(process)
        end = read_json(folder / END)  # after that, so that a process that ends between the two is not taken for lost
        kind, run = facts.get("kind"), facts.get("run")
        if kind not in TURNS or not isinstance(run, str):
            return None
        if end:
            states: dict[Any, State] = {0: "done", 130: "stopped", WITHDRAWN: "withdrawn"}
            return Job(folder, kind, run, states.get(end.get("status"), "failed"))
        if not process:
            return Job(folder, kind, run, "waiting", place=before[TURNS[kind]])
        if alive:
            stopping = (folder / STOP).is_file()
            return Job(folder, kind, run, "running", process["pid"], 0, process.get("started"), stopping)
        return Job(folder, kind, run, "stopped" if (folder / STOP).is_file() else "lost")

    def _start(self, job: Job) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(PROCESS_FOLDER), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "TQDM_MININTERVAL": "2",  # seconds; its lines are kept
        }
        if TURNS[job.kind] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # it has not waited for the device
        with (job.folder / LOG).open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "gsoft_diffusion.app.job", str(job.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # what ends the page, or its terminal, does not end the run
            )
        try:
            created = psutil.Process(child.pid).create_time()
            write_json(job.folder / PROCESS, {"pid": child.pid, "created": created, "started": time.time()})
        except Exception:  # a page that starts anew would not know of the process, and start the job once more
            child.kill()
            child.wait()
            raise
        self._children[job.number] = child

    def _kill_late(self, job: Job) -> None:
        """Kill a job, with the processes that it has started, which may not save and has not ended in time."""
        asked, process = read_json(job.folder / STOP), read_json(job.folder / PROCESS)
        if asked.get("at_once") and time.time() - asked.get("time", 0) > GRACE and _alive(process):
            with suppress(ProcessLookupError):
                os.killpg(process["pid"], signal.SIGKILL)

    def _send(self, job: Job, number: signal.Signals) -> None:
        process = read_json(job.folder / PROCESS)
        if _alive(process):
            with suppress(ProcessLookupError):
                os.kill(process["pid"], number)


def _needs(job: Job, folder: Path) -> bool:
    """Whether a job's settings name a folder or what is in it, by whatever path; so if they cannot be read."""
    try:
        texts = list(_texts(job.settings()))
    except UserError:
        return True
    for text in texts:
        with suppress(RuntimeError, ValueError):  # it is no path
            if Path(os.path.realpath(Path(text).expanduser())).is_relative_to(folder):
                return True
    return False


def _texts(value: Any) -> Iterator[str]:
    """All texts in a job's settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _alive(process: Mapping[str, Any]) -> bool:
    """Whether the process still runs, and its number has not gone to another. process: as `Jobs` has written it."""
    try:
        found = psutil.Process(process["pid"])
        return abs(found.create_time() - process["created"]) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError):
        return False
