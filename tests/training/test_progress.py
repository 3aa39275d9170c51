"""What a run says of its steps while it is under way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gsoft_diffusion.foundation.run_folder import PROGRESS
from gsoft_diffusion.training.progress import Progress, StepNumbers, read_progress, seconds_left
from gsoft_diffusion.training.train import train


def test_a_run_writes_a_line_for_each_step_and_goes_on_where_it_was_resumed(config):
    folder = train(replace(config, max_train_steps=2, checkpointing_steps=2)).adapter.parent
    assert [each.step for each in read_progress(folder)] == [1, 2]
    train(replace(config, max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest"))
    numbers = read_progress(folder)
    assert [each.step for each in numbers] == [1, 2, 3, 4]
    assert all(each.loss > 0 and each.lr == config.learning_rate for each in numbers)
    assert sorted(each.time for each in numbers) == [each.time for each in numbers]


def test_steps_that_a_resumed_run_has_lost_are_not_done(tmp_path):
    """It was killed at step 9, and went on from its checkpoint of step 5."""
    steps = [*range(1, 10), 6, 7]
    lines = [{"step": step, "loss": 1, "lr": 1, "time": time} for time, step in enumerate(steps)]
    (tmp_path / PROGRESS).write_text("\n".join(map(json.dumps, lines)))
    numbers = read_progress(tmp_path)
    assert [each.step for each in numbers] == [1, 2, 3, 4, 5, 6, 7]
    assert [each.time for each in numbers][-2:] == [9, 10]
    assert seconds_left(numbers, 12) == 5


def test_what_is_no_whole_line_is_left_out_and_the_later_of_two_counts(tmp_path):
    lines = [{"step": step, "loss": loss, "lr": 1, "time": 5} for step, loss in ((1, 0.5), (2, 0.6), (2, 0.7))]
    text = "\n".join(map(json.dumps, lines)) + '\n[1]\n"x"\n{"step": 3}\n{"step": 4, "loss": 0.'
    (tmp_path / PROGRESS).write_text(text)
    assert [(each.step, each.loss) for each in read_progress(tmp_path)] == [(1, 0.5), (2, 0.7)]
    assert read_progress(tmp_path / "nowhere") == []


def test_the_first_line_of_a_resumed_run_is_whole_though_a_killed_one_ended_within_a_line(tmp_path):
    first = {"step": 1, "loss": 0.5, "lr": 1, "time": 5}
    (tmp_path / PROGRESS).write_text(json.dumps(first) + '\n{"step": 2, "lo')
    Progress(tmp_path, pytest.fail).write(2, 0.25, 1e-3)
    assert [(each.step, each.loss) for each in read_progress(tmp_path)] == [(1, 0.5), (2, 0.25)]


def test_the_time_left_does_not_count_a_pause_for_pictures():
    times = [0, 1, 2, 60, 61, 62]
    numbers = [StepNumbers(step, 0.1, 1e-3, time) for step, time in enumerate(times, start=1)]
    assert seconds_left(numbers, 16) == 10
    assert seconds_left(numbers[:1], 16) is None


def test_a_disk_that_is_full_is_said_once_and_ends_nothing(tmp_path):
    said: list[str] = []
    progress = Progress(Path("/dev/full/nowhere"), said.append)
    for step in (1, 2):
        progress.write(step, 0.5, 1e-3)
    assert len(said) == 1
    assert said[0].startswith("note: cannot write /dev/full/nowhere/progress.jsonl (Not a directory)")


@pytest.mark.parametrize("steps", [1, 5])
def test_numbers_are_written_as_they_were(tmp_path, steps):
    progress = Progress(tmp_path, pytest.fail)
    for step in range(1, steps + 1):
        progress.write(step, 0.1 * step, 1e-3)
    assert [(each.step, each.loss, each.lr) for each in read_progress(tmp_path)] == [
        (step, 0.1 * step, 1e-3) for step in range(1, steps + 1)
    ]
