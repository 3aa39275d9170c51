"""Pieces of the page: what they say, and that texts of others stay texts."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace

import pytest
from page_folders import write_run
from PIL import Image

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.jobs import Job
from gsoft_diffusion.app.runs import RunView
from gsoft_diffusion.app.steps import take_home
from gsoft_diffusion.app.subjects import new_subject
from gsoft_diffusion.sampling.pictures import save_png
from gsoft_diffusion.training.progress import StepNumbers

EVIL = "<script>alert('x')</script>\"onerror='"
SETTINGS = "instance_data_dir: x\nclass_word: dog\nmax_train_steps: 40\n"


@pytest.fixture
def folder(workspace):
    return write_run(workspace.root / "dog", settings=SETTINGS)


@pytest.fixture
def job(workspace) -> Job:
    place = workspace.jobs / "0001"
    place.mkdir()
    return Job(place, "train", "dog", "running", 1, started=0.0)


def only_text(html: str) -> None:
    assert "<script" not in html
    assert not re.search(r"<[^>]*\"onerror", html)


def steps(count: int, since: float, pace: float = 1.0) -> str:
    lines = [{"step": at, "loss": 1 / at, "lr": 1e-3, "time": since + pace * at} for at in range(1, count + 1)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_the_headline_of_each_state(folder, job):
    (folder / "progress.jsonl").write_text(steps(10, time.time()))
    said = {
        "running": "step 10 of 40, 30 s left",
        "stopped": "stopped, step 10 of 40",
        "done": "done, step 10 of 40",
        "lost": "ended without a word, step 10 of 40",
    }
    for state, words in said.items():
        assert words in fragments.headline(RunView(folder, replace(job, state=state)))
    assert "step 10 of 40, is stopping" in fragments.headline(RunView(folder, replace(job, stopping=True)))
    assert "waits in the queue, 2 before it" in fragments.headline(
        RunView(folder, replace(job, state="waiting", place=2))
    )
    assert "it was not started from this page" in fragments.headline(RunView(folder))


def test_a_run_that_is_stuck_is_said_to_be_with_its_last_words(folder, job):
    (job.folder / "log.txt").write_text("loading\n" + EVIL + "\n")
    (folder / "progress.jsonl").write_text(steps(3, time.time()))
    assert "stuck" not in fragments.headline(RunView(folder, job))
    for path in (job.folder / "log.txt", folder / "progress.jsonl"):
        os.utime(path, (time.time() - 1000, time.time() - 1000))
    html = fragments.headline(RunView(folder, job))
    assert "It has said nothing for 17 min and may be stuck" in html
    assert "loading" in html
    only_text(html)


def test_what_went_wrong_is_part_of_the_headline(folder, job):
    (job.folder / "log.txt").write_text(f"error: {EVIL}\n")
    html = fragments.headline(RunView(folder, replace(job, state="failed")))
    assert 'role="alert"' in html
    only_text(html)


def test_the_curve_is_above_the_pictures_and_asked_for_again_when_it_changes(folder, job):
    save_png(Image.new("RGB", (8, 8)), folder / "validation" / "step-000005", "{}_seed0_x.png", 0, {})
    Image.new("RGB", (8, 8)).save(folder / "validation" / "step-000005.png")
    assert "curve.png" not in fragments.sheets(RunView(folder, job))
    Image.new("RGB", (8, 8)).save(folder / "validation" / "curve.png")
    first = fragments.sheets(RunView(folder, job))
    assert f"/files/picture/{folder.name}/validation/curve.png?" in first.replace("%20", " ")
    os.utime(folder / "validation" / "curve.png", (1, 1))
    assert fragments.sheets(RunView(folder, job)) != first


def test_texts_of_others_stay_texts(workspace, folder, job, tmp_path):
    facts = {
        "prompt": EVIL,
        "seed": EVIL,
        "model": "adapter",
        "adapters": [{"name": EVIL, "strength": EVIL}],
        "sampler": EVIL,
    }
    save_png(Image.new("RGB", (8, 8)), folder / "images", "{}_seed0_x.png", 0, facts)
    place = folder / "validation" / "step-000005"
    save_png(Image.new("RGB", (8, 8)), place, "{}_seed0_x.png", 0, facts)
    Image.new("RGB", (8, 8)).save(folder / "validation" / "step-000005.png")
    view = RunView(folder, job)
    for html in (fragments.gallery(view), fragments.sheets(view), fragments.queue([replace(job, run=EVIL)])):
        assert "alert(" in html
        only_text(html)
    subject = new_subject(workspace, "dog", f"dog {EVIL}", "sks")
    Image.new("RGB", (70, 70), "red").save(tmp_path / "a.png")
    subject.add_photo(tmp_path / "a.png", "a.png")
    html = fragments.photo_cards(subject, subject.seen(), "a.png")
    assert "alert(" in html
    only_text(html)


def test_the_gallery_says_how_many_pictures_it_does_not_show(folder):
    for number in range(3):
        save_png(Image.new("RGB", (8, 8)), folder / "images", "{}_seed0_x.png", number, {"prompt": "a dog"})
    html = fragments.gallery(RunView(folder), most=2)
    assert html.count("<figure>") == 2
    assert "1 more are in dog/images." in html
    assert "more are in" not in fragments.gallery(RunView(folder), most=3)


def test_notes_stand_apart_from_the_log(job):
    (job.folder / "log.txt").write_text(f"loading\nnote: {EVIL}\n")
    assert "loading" not in fragments.notes(job)
    assert "alert(" in fragments.notes(job)
    assert "loading" in fragments.log_tail(job)
    for html in (fragments.notes(job), fragments.log_tail(job)):
        only_text(html)
    assert fragments.notes(None) == ""
    assert "Nothing yet" in fragments.log_tail(None)


@pytest.mark.parametrize(
    "facts", [{}, {"adapters": 5, "sampler": []}, {"adapters": [1, {}], "model": 3, "prompt": None}]
)
def test_facts_that_are_none_are_shown_somehow(folder, facts):
    save_png(Image.new("RGB", (8, 8)), folder / "images", "{}_seed0_x.png", 0, facts)
    assert "<figure>" in fragments.gallery(RunView(folder))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (5500, "1 h 32 min"), (90000, "25 h 00 min")],
)
def test_times_are_said_as_people_say_them(seconds, words):
    assert fragments.duration(seconds) == words


def test_a_curve_of_very_many_steps_has_few_points():
    numbers = [StepNumbers(step, 1 / step, 1e-3, step) for step in range(1, 5001)]
    html = fragments.loss_curve(numbers)
    assert 200 < len(html.partition('points="')[2].partition('"')[0].split()) <= fragments.POINTS + 1
    assert "at step 5000" in html or "at step 49" in html
    assert fragments.loss_curve(numbers[:1]) == ""
    assert "nan" not in fragments.loss_curve([StepNumbers(step, 0.5, 1e-3, step) for step in (1, 2)])


def test_every_file_to_take_home_says_where_it_goes(folder):
    names = [
        "adapter.safetensors",
        "kohya_lora_rank8.safetensors",
        "diffusers_lora_rank8.safetensors",
        "merged.safetensors",
        "diff.safetensors",
    ]
    for name in (*names, "merged_checkpoint-5.safetensors"):
        (folder / name).write_bytes(bytes(1_000_000))
    (folder / "merged").mkdir()
    html = take_home._files(RunView(folder), "adapter.safetensors")
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    assert len(rows) == 7
    for row, words in zip(
        rows,
        ["gsoft-draw", "where a LoRA goes", "diffusers", "loras", "checkpoints", "checkpoints", "merged.zip"],
        strict=True,
    ):
        assert words in row
    assert "1.0 MB" in rows[0]
