"""What a run's folder says, whoever started the run."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
from page_folders import write_run
from PIL import Image

from gsoft_diffusion.app.jobs import Job
from gsoft_diffusion.app.runs import RunView
from gsoft_diffusion.app.workspace import write_json
from gsoft_diffusion.sampling.pictures import save_png


def lines(*steps: int, since: float = 0.0, pace: float = 1.0) -> str:
    return "".join(
        json.dumps({"step": step, "loss": 1 / step, "lr": 1e-3, "time": since + pace * step}) + "\n" for step in steps
    )


@pytest.fixture
def folder(workspace):
    return write_run(
        workspace.root / "dog", lines(*range(1, 11)), "instance_data_dir: x\nclass_word: dog\nmax_train_steps: 40\n"
    )


@pytest.fixture
def job(workspace) -> Job:
    """A training at work whose process was started long before the run's first step."""
    place = workspace.jobs / "0001"
    place.mkdir()
    write_json(place / "job.json", {})
    os.utime(place / "job.json", (0, 0))
    return Job(place, "train", "dog", "running", 1, started=0.0)


def test_progress_of_a_run_at_work(folder, job):
    view = RunView(folder, job)
    assert (view.step, view.last_step, view.seconds_left, view.trains) == (10, 40, 30.0, True)


@pytest.mark.parametrize("started", [20.0, None])
def test_a_run_that_was_started_anew_has_not_trained_yet(folder, job, started):
    """Nor one of whose process nothing is known."""
    assert not RunView(folder, replace(job, started=started)).trains


def test_no_time_is_left_of_a_run_that_has_ended(folder, job):
    view = RunView(folder, replace(job, state="stopped"))
    assert (view.step, view.seconds_left, view.trains, view.silence) == (10, None, False, None)


def test_a_run_that_says_nothing_for_long_is_stuck(folder, job):
    now = time.time()
    for age, stuck in ((100, False), (400, True)):
        os.utime(folder / "progress.jsonl", (now - age, now - age))
        assert (RunView(folder, job).silence is not None) == stuck
    (folder / "progress.jsonl").write_text(lines(*range(1, 11), pace=60))  # a minute a step
    os.utime(folder / "progress.jsonl", (now - 400, now - 400))
    assert RunView(folder, job).silence is None


def test_an_empty_or_broken_folder_says_nothing(workspace):
    folder = write_run(workspace.root / "dog", "nonsense\n", "- a list\n")
    view = RunView(folder)
    assert (view.step, view.last_step, view.settings, view.steps, view.adapters) == (0, None, None, [], {})
    assert (view.drawn, view.exports, view.card, view.best) == ([], [], "", None)


def picture(folder, number, model="adapter", **facts):
    return save_png(
        Image.new("RGB", (8, 8)), folder, "{}_seed0_x.png", number, {"prompt": f"p{number}", "model": model, **facts}
    )


def test_validations_in_order_with_their_scores(folder):
    for step, balance in ((0, None), (5, 0.1), (10, 0.3)):
        place = folder / "validation" / f"step-{step:06d}"
        for number in range(2):
            picture(place, number)
        (place / "scores.json").write_text(json.dumps({"dino": 0.5, "clip_t": 0.6, "balance": balance}))
        Image.new("RGB", (8, 8)).save(folder / "validation" / f"step-{step:06d}.png")
    (folder / "validation" / "step-000020").mkdir()  # still being drawn: there is no sheet yet
    view = RunView(folder)
    assert [step.step for step in view.steps] == [0, 5, 10]
    assert [len(step.pictures) for step in view.steps] == [2, 2, 2]
    assert view.steps[1].pictures[1].prompt == "p1"
    assert view.best == 10


def test_what_was_drawn_the_latest_first_pairs_together(folder):
    images = folder / "images"
    drawn = [picture(images, 0), picture(images, 1), picture(folder / "images" / "checkpoint-5", 0)]
    base = save_png(Image.new("RGB", (8, 8)), images, "{}_seed0_base_x.png", 0, {"model": "base"})
    for age, path in enumerate([*drawn, base]):
        os.utime(path, (age, age))
    (images / "link_seed0_x.png").symlink_to(drawn[0])
    assert [[each.name for each in group] for group in RunView(folder).drawn] == [
        ["images/0000_seed0_x.png", "images/0000_seed0_base_x.png"],
        ["images/checkpoint-5/0000_seed0_x.png"],
        ["images/0001_seed0_x.png"],
    ]


def test_exports_and_the_card(folder):
    made = ["diff.safetensors", "diff_checkpoint-5.safetensors", "diffusers_lora_rank8.safetensors"]
    made += ["kohya_lora_rank8.safetensors", "merged_checkpoint-5.safetensors"]
    for name in (*made, "other.safetensors"):
        (folder / name).write_text("x")
    (folder / "merged").mkdir()
    (folder / "README.md").write_text("---\na: b\n---\n\n# A dog\n")
    view = RunView(folder)
    assert view.exports == [*made, "merged/"]
    assert view.card.strip() == "# A dog"
