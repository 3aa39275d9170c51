"""Faults that nights bring, brought about on purpose: a run is hurt, resumed, and compared with one left alone.

python tests/faults.py                               # all of them; what it printed is docs/reliability/faults.txt
python tests/faults.py write_fails damaged_file      # those of some kinds
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
from child_runs import Outcome, finish, start, train_in_child  # noqa: E402

from gsoft_diffusion.adapters.file import read_adapter, save_adapter  # noqa: E402
from gsoft_diffusion.config import AdapterConfig, SamplerConfig, TrainingConfig  # noqa: E402
from gsoft_diffusion.foundation import files  # noqa: E402
from gsoft_diffusion.training import checkpoints  # noqa: E402
from gsoft_diffusion.training.outputs import RunOutputs  # noqa: E402
from gsoft_diffusion.training.state import TrainingState  # noqa: E402
from gsoft_diffusion.training.step import TrainingStep  # noqa: E402

STEPS, EVERY = 6, 2
KILLED_BY_SIZE = -signal.SIGXFSZ


def run_to_hurt(base: Path, photos: Path, output: Path) -> TrainingConfig:
    """A run that has something to lose at every step: moments, a schedule, flips, and one checkpoint at a time."""
    return TrainingConfig(
        str(photos),
        class_word="dog",
        output_dir=str(output),
        pretrained_model_name_or_path=str(base),
        adapter=AdapterConfig(nblocks=4),
        random_flip=True,
        offset_noise=0.1,
        max_train_steps=STEPS,
        train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler="cosine",
        checkpointing_steps=EVERY,
        checkpoints_total_limit=1,
        num_validation_images=0,
        report_to="tensorboard",
        sampler=SamplerConfig(num_inference_steps=2),
    )


# What is done to a run, from inside it


def note_checkpoints(file: Path) -> None:
    """Have the step of every checkpoint that is complete written down: it must be there whatever comes after."""
    original = RunOutputs.write_checkpoint

    def write_checkpoint(outputs: RunOutputs, state: TrainingState, circumstances: Any) -> None:
        original(outputs, state, circumstances)
        file.write_text(str(state.step))

    RunOutputs.write_checkpoint = write_checkpoint  # type: ignore[method-assign]


def at_step(number: int, act: Callable[[TrainingStep], Any]) -> None:
    original = TrainingStep.loss

    def loss(step: TrainingStep, batch: Any) -> Any:
        if step.state.step == number:
            act(step)
        return original(step, batch)

    TrainingStep.loss = loss  # type: ignore[method-assign]


@dataclass(frozen=True)
class Hurt:
    """A fault; `kind` and `detail` say what it is. `notes` is where the run notes its checkpoints."""

    notes: Path
    kind: str
    detail: int

    def __call__(self) -> None:
        note_checkpoints(self.notes)
        getattr(self, self.kind)(self.detail)

    def left_alone(self, _: int) -> None:
        pass

    def killed_at_line(self, number: int) -> None:
        """SIGKILL at the given line, counted as they are executed, of all that writes files."""
        executed = 0

        def line(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal executed
            if event == "line":
                executed += 1
                if executed == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            elif event == "return" and number == 0:  # only counting
                self.notes.with_suffix(".lines").write_text(str(executed))
            return line

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            code = frame.f_code
            if code is checkpoints._Writer.write.__code__:  # thousands of times; see `killed_in_a_write`
                return None
            writes = code.co_filename in (checkpoints.__file__, files.__file__) or code is save_adapter.__code__
            return line if writes else None

        sys.settrace(trace)

    def killed_in_a_write(self, size: int) -> None:
        """After the first checkpoint the kernel ends the process when a file gets longer than this."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        at_step(EVERY + 1, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

    def write_fails(self, size: int) -> None:
        at_step(EVERY + 1, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

    def killed_at_any_time(self, _: int) -> None:
        pass  # by the harness, from outside

    def stopped_by_a_signal(self, step: int) -> None:
        at_step(step, lambda run: os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[step % 2]))

    def loss_goes_wrong(self, step: int) -> None:
        original = TrainingStep.loss

        def loss(self: TrainingStep, batch: Any) -> Any:
            return original(self, batch) * (float("nan") if self.state.step == step else 1)

        TrainingStep.loss = loss  # type: ignore[method-assign]

    def full_file_system(self, _: int) -> None:
        pass  # the harness makes a small one

    def becomes_read_only(self, step: int) -> None:
        at_step(step, lambda step: make_immutable(Path(step.config.output_dir or "."), True))

    def loses_permission(self, step: int) -> None:
        """From that step on the process is another user's, to whom nothing belongs."""

        def lose(_: TrainingStep) -> None:
            os.setegid(65534)
            os.seteuid(65534)

        at_step(step, lose)

    def damaged_file(self, _: int) -> None:
        pass  # by the harness, afterwards


# The harness


@dataclass
class Harness:
    """Runs in `folder` of the model `base` on `photos`; `expected` is the adapter of a run that was left alone."""

    folder: Path
    base: Path
    photos: Path
    tried: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, self.notes = self.folder / "log", self.folder / "notes"
        whole = run_to_hurt(self.base, self.photos, self.folder / "whole")
        outcome = train_in_child(whole, self.log, Hurt(self.notes, "left_alone", 0))
        assert outcome.status == 0, outcome.output
        self.expected = read_adapter(self.folder / "whole" / "adapter.safetensors").tensors

    def lines(self) -> int:
        """How many lines of what writes files a run executes."""
        config = run_to_hurt(self.base, self.photos, self.folder / "counted")
        assert train_in_child(config, self.log, Hurt(self.notes, "killed_at_line", 0)).status == 0
        shutil.rmtree(self.folder / "counted")
        return int(self.notes.with_suffix(".lines").read_text())

    def survives(self, kind: str, detail: int) -> str:
        """Hurt a run and resume it; says what happened. AssertionError if anything was lost."""
        self.tried += 1
        with small_file_system(self.folder / "disk", detail if kind == "full_file_system" else 64 * 1024) as disk:
            output = (disk if kind == "full_file_system" else self.folder) / "run"
            try:
                return self._survives(kind, detail, run_to_hurt(self.base, self.photos, output))
            finally:
                shutil.rmtree(output, ignore_errors=True)

    def _survives(self, kind: str, detail: int, config: TrainingConfig) -> str:
        output = Path(config.output_dir or "")
        for file in (self.log, self.notes):
            file.unlink(missing_ok=True)
        outcome = self._hurt(kind, detail, config)
        self._check_message(kind, outcome)
        if kind == "full_file_system":
            subprocess.run(["mount", "-o", "remount,size=64M", output.parent], check=True)
        if kind == "becomes_read_only":
            make_immutable(output, False)
        complete = int(self.notes.read_text()) if self.notes.exists() else 0
        if kind == "damaged_file":
            complete = damage(output, detail)
        sound = [path for path in checkpoints.checkpoints(output) if checkpoints.damage_of(path) is None]
        latest = checkpoints.step_of(sound[-1]) if sound else 0
        assert latest >= complete, f"checkpoint-{complete} was complete and is lost; {outcome.output}"
        began = (output / checkpoints.SETTINGS).exists()
        again = replace(config, resume_from_checkpoint="latest") if began else config
        self.log.unlink(missing_ok=True)
        resumed = train_in_child(again, self.log)
        finished = resumed.status == 2 and latest == STEPS and "nothing is left to train" in resumed.output
        assert resumed.status == 0 or finished, resumed.output
        tensors = read_adapter(output / "adapter.safetensors").tensors
        assert tensors.keys() == self.expected.keys()
        assert all(torch.equal(tensors[name], self.expected[name]) for name in tensors), "other weights"
        unfinished = [path.name for path in output.iterdir() if path.name.startswith(".")]
        assert not unfinished, f"left behind: {unfinished}"
        return f"status {outcome.status}, {complete} steps were safe, resumed from {latest or 'the start'}, identical"

    def _hurt(self, kind: str, detail: int, config: TrainingConfig) -> Outcome:
        if kind == "damaged_file":
            config = replace(config, checkpoints_total_limit=None)
        process = start(config, self.log, Hurt(self.notes, kind, detail))
        if kind == "killed_at_any_time":  # milliseconds after the first checkpoint
            while process.is_alive() and not self.notes.exists():
                time.sleep(0.001)
            time.sleep(detail / 1000)
            process.kill()
        return finish(process, self.log)

    def _check_message(self, kind: str, outcome: Outcome) -> None:
        """Whoever is not killed says in one line what is wrong."""
        if kind in ("killed_at_line", "killed_in_a_write", "killed_at_any_time", "damaged_file"):
            assert outcome.status in (-signal.SIGKILL, KILLED_BY_SIZE, 0), outcome.output
        elif kind == "stopped_by_a_signal":
            assert outcome.status == 130, outcome.output
        else:
            errors = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
            assert (outcome.status, len(errors)) == (2, 1), outcome.output
            assert "Traceback" not in outcome.output, outcome.output


def damage(output: Path, number: int) -> int:
    """Cut or change a file of the newest checkpoint; the step of the one before, from which to go on."""
    *_, before, newest = checkpoints.checkpoints(output)
    (output / "adapter.safetensors").unlink()
    chance = random.Random(number)
    file = newest / chance.choice([checkpoints.STATE, checkpoints.ADAPTER, checkpoints.SUMS])
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content) - 1)
    if number % 2:
        content[at] ^= 1 << chance.randrange(8)
    else:
        del content[at:]
    file.write_bytes(content)
    return checkpoints.step_of(before)


def can_mount() -> bool:
    """Whether small file systems can be made here, which needs root's rights."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode != 0:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


@contextmanager
def small_file_system(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A file system of that size in memory, or just a folder where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    mounted = can_mount()
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def make_immutable(folder: Path, on: bool) -> None:
    """Let nothing be made, renamed or deleted in the folder, which holds for root too."""
    subprocess.run(["chattr", "+i" if on else "-i", folder], check=True)


def needs_root(kind: str) -> bool:
    return kind in ("full_file_system", "becomes_read_only", "loses_permission")


def all_faults(lines: int) -> dict[str, Sequence[int]]:
    """The faults of the committed figures."""
    chance = random.Random(0)
    return {
        "killed_at_line": sorted(chance.sample(range(1, lines + 1), 24)),
        "killed_in_a_write": [1, 1_000, *range(40_000, 280_001, 40_000)],
        "killed_at_any_time": sorted(chance.randrange(400) for _ in range(8)),
        "write_fails": [20_000, 50_000, 100_000, 200_000],  # more than the log, which must take the message
        "full_file_system": [4, 192, 448, 600, 680],
        "becomes_read_only": [0, 2, 4],
        "loses_permission": [0, 2, 4],
        "damaged_file": range(10),
        "stopped_by_a_signal": [0, 1, 2],
        "loss_goes_wrong": [0, 3, 5],
    }


def main() -> int:
    from conftest import write_base, write_photos

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        harness = Harness(folder / "runs", write_base(folder / "base"), write_photos(folder / "photos"))
        lines = harness.lines()
        print(f"# {lines} lines of what writes files are executed in a run of {STEPS} steps")
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for kind, details in all_faults(lines).items():
            if len(sys.argv) > 1 and kind not in sys.argv[1:]:
                continue
            for detail in details:
                try:
                    what, survived = harness.survives(kind, detail), True
                except AssertionError as error:
                    what, survived = f"LOST: {error}", False
                counts[kind][0] += 1
                counts[kind][1] += survived
                print(f"{kind} {detail}: {what}", flush=True)
    print("\n| fault | tried | survived | lost |\n|---|---|---|---|")
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    for kind, (tried, survived) in counts.items():
        print(f"| {kind.replace('_', ' ')} | {tried} | {survived} | {tried - survived} |")
    return int(counts["all"][0] != counts["all"][1])


if __name__ == "__main__":
    sys.exit(main())
