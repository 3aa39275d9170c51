"""What the buttons of step 3 do, called as Gradio calls them."""

from __future__ import annotations

import json
import signal
import time

import gradio as gr
import pytest
from page_folders import write_run
from PIL import Image

from gsoft_diffusion.app.fields import fields_of
from gsoft_diffusion.app.jobs import Jobs
from gsoft_diffusion.app.runs import RunView
from gsoft_diffusion.app.steps import train as train_step
from gsoft_diffusion.app.steps.train import ELSEWHERE, Handlers, training_settings
from gsoft_diffusion.app.subjects import new_subject, subject_of
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.settings import Mark, marked, read_yaml


@pytest.fixture
def does(page) -> Handlers:
    return Handlers(page, [each for each in fields_of(TrainingConfig, ELSEWHERE) if each.name == "max_train_steps"])


def test_no_field_takes_a_path():
    """What is outside of the page's folder is not read; the base model is chosen in step 2."""
    assert set(marked(TrainingConfig, Mark.PATH)) <= set(ELSEWHERE)


def test_a_run_goes_on_in_its_own_folder_though_it_was_moved(page, does, sleeping):
    old = page.workspace.root / "rex"  # where it began, and another one is now
    settings = f"instance_data_dir: x\nclass_word: dog\nmax_train_steps: 4\noutput_dir: {old}\n"
    write_run(old, settings=settings)
    folder = write_run(page.workspace.root / "rex-old", settings=settings)
    assert does.went_on("rex-old", "9")[:3] == [gr.skip(), "", gr.skip()]
    job = page.jobs.current("rex-old", "train")
    kept = read_yaml(job.folder / "settings.yaml")
    assert kept["output_dir"] == str(folder)
    assert (kept["max_train_steps"], kept["resume_from_checkpoint"]) == (9, "latest")


def test_a_run_that_has_not_begun_cannot_go_on(page, does, sleeping):
    page.jobs.add("train", "rex", {})
    (page.jobs.current("rex", "train").folder / "end.json").write_text('{"status": 2}')
    assert "rex has not begun, so it cannot go on" in does.went_on("rex", "")[1]


def test_a_run_that_is_in_the_queue_does_not_go_on_twice(page, does, sleeping):
    write_run(page.workspace.root / "rex", settings="instance_data_dir: x\nclass_word: dog\nmax_train_steps: 4\n")
    assert does.went_on("rex", "9")[1] == ""
    assert "rex is in the queue already" in does.went_on("rex", "9")[1]
    assert len(page.jobs.all()) == 1


def test_changes_are_accepted_when_a_run_goes_on_and_only_then(page, sleeping):
    fields = [
        each for each in fields_of(TrainingConfig, ELSEWHERE) if each.name in ("max_train_steps", "accept_changes")
    ]
    does, given = Handlers(page, fields), {"max_train_steps": "9", "accept_changes": True}
    settings = "instance_data_dir: x\nclass_word: dog\nmax_train_steps: 4\n"
    for name, before, ticked in (("a", "", True), ("b", "accept_changes: true\n", False)):
        write_run(page.workspace.root / name, settings=settings + before)
        does.went_on(
            name, *(given[each.name] if ticked or each.name == "max_train_steps" else False for each in fields)
        )
        kept = read_yaml(page.jobs.current(name, "train").folder / "settings.yaml")
        assert kept.get("accept_changes", False) is ticked


def test_fitting_changes_what_it_must_and_nothing_that_is_typed_meanwhile(page, monkeypatch):
    names = ("max_train_steps", "train_batch_size")
    fields = [each for each in fields_of(TrainingConfig, ELSEWHERE) if each.name in names]
    dog = new_subject(page.workspace, "dog", "dog", "sks")
    Image.new("RGB", (64, 64)).save(dog.photos / "0.png")
    monkeypatch.setattr(train_step, "fitting_changes", lambda config, memory: {"train_batch_size": 1})
    given = {"max_train_steps": "9", "train_batch_size": "4"}
    _, said, *held = Handlers(page, fields).fitted("dog", "8", *(given[each.name] for each in fields))
    assert "Changed in step 3: train_batch_size 1." in said
    found = dict(zip([each.name for each in fields], held, strict=True))
    assert found["max_train_steps"] == gr.skip()
    assert found["train_batch_size"] != gr.skip()


def test_a_second_press_of_stop_ends_a_training_only_if_it_is_stuck(page, does, sleeping, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(Jobs, "_send", lambda jobs, job, number: sent.append(number))
    page.jobs.add("train", "rex", {})
    does.stopped("rex")
    assert "before its next step" in capsys.readouterr().out
    does.stopped("rex")
    assert "stopping already" in capsys.readouterr().out
    assert sent == [signal.SIGTERM]
    monkeypatch.setattr(RunView, "silence", 600.0)
    does.stopped("rex")
    assert "ends without saving" in capsys.readouterr().out
    assert sent == [signal.SIGTERM] * 2


def test_what_stop_does_is_said_as_it_is(page, does, sleeping, monkeypatch, capsys):
    for name in ("rex", "tom"):
        page.jobs.add("train", name, {})
    does.stopped("tom")
    assert "taken out of the queue" in capsys.readouterr().out
    monkeypatch.setattr(RunView, "trains", True)
    does.stopped("rex")
    assert "saves what it has learned" in capsys.readouterr().out


def test_a_run_of_the_command_line_can_go_on(page, does):
    write_run(page.workspace.root / "rex", settings="instance_data_dir: x\nclass_word: dog\nmax_train_steps: 4\n")
    *_, stop, go_on, draw_now, delete, _ = does.watched("rex", [])
    assert [each["interactive"] for each in (stop, go_on, draw_now, delete)] == [False, True, False, True]


def test_prompts_have_the_name_that_the_base_model_gives_the_subject(page, sleeping, monkeypatch):
    """The base model was named in step 2 and not used yet."""
    fields = [each for each in fields_of(TrainingConfig, ELSEWHERE) if each.name == "validation_prompts"]
    dog = new_subject(page.workspace, "rex", "dog", "sks")
    Image.new("RGB", (64, 64)).save(dog.photos / "0.png")
    monkeypatch.setattr(
        train_step, "settled", lambda known, kind, name: known.keep({"base": name, "token": "ohwx", "resolution": 512})
    )
    assert Handlers(page, fields).started("rex", "other", "a/b", "a sks dog on a beach")[1] == ""
    settings = read_yaml(page.jobs.current("rex", "train").folder / "settings.yaml")
    assert (settings["unique_token"], settings["validation_prompts"]) == ("ohwx", ["a ohwx dog on a beach"])
    assert subject_of(page.workspace, "rex").settings["validation_prompts"] == ["a ohwx dog on a beach"]


@pytest.mark.parametrize(
    ("given", "every"),
    [
        ({}, TrainingConfig.validation_steps),
        ({"validation_steps": 7}, 7),
        ({"validation_steps": 7, "checkpointing_steps": 3}, 3),
        ({"validation_steps": 0}, TrainingConfig.checkpointing_steps),
    ],
)
def test_every_sheet_has_a_checkpoint(page, given, every):
    subject = new_subject(page.workspace, "rex", "dog", "sks")
    Image.new("RGB", (64, 64)).save(subject.photos / "a.png")
    settings = training_settings(subject, given)
    assert TrainingConfig.from_dict(settings | {"output_dir": "x"}, "settings").checkpointing_steps == every


def test_a_run_is_asked_to_draw_only_once_it_listens(page, does, sleeping, monkeypatch, capsys):
    """Before its first step the wish would end it, or be lost."""
    asked = []
    monkeypatch.setattr(Jobs, "draw_now", lambda jobs, job: asked.append(job.run))
    page.jobs.add("train", "rex", {})
    with pytest.raises(gr.Error, match="it has not done a step since it was started"):
        does.drawn("rex")
    assert asked == []
    step = {"step": 1, "loss": 1.0, "lr": 0.1, "time": time.time() + 60}
    write_run(page.workspace.root / "rex", json.dumps(step) + "\n")
    does.drawn("rex")
    assert "It draws after this step" in capsys.readouterr().out
    assert asked == ["rex"]


def test_a_run_is_deleted_and_only_a_run(page, does):
    for name in ("rex", "rex-2"):
        write_run(page.workspace.root / name)
    (page.workspace.root / "rex" / "checkpoint-4").mkdir()
    (page.workspace.root / "rex" / "checkpoint-4" / "state.pt").write_bytes(bytes(3_000_000))
    assert "checkpoints, pictures and exports, 3 MB?" in does.before_deleting("rex")
    choice, question = does.deleted("rex")
    assert (choice["choices"], choice["value"], question["visible"]) == (["rex-2"], "rex-2", False)
    for name in ("rex", "app", "../outputs/rex-2", "."):
        with pytest.raises(gr.Error, match="there is no run"):
            does.deleted(name)
    assert sorted(path.name for path in page.workspace.root.iterdir()) == ["app", "rex-2"]


def test_a_run_that_is_under_way_cannot_be_deleted(page, does, sleeping):
    write_run(page.workspace.root / "rex")
    page.jobs.add("train", "rex", {})
    *_, delete, _ = does.watched("rex", [])
    assert not delete["interactive"]


def test_a_run_that_wrote_nothing_but_a_folder_can_be_deleted(page, does, sleeping):
    """As one that was killed while it loaded its model."""
    (page.workspace.root / "rex").mkdir()
    page.jobs.add("train", "rex", {})
    (page.jobs.current("rex", "train").folder / "end.json").write_text('{"status": 2}')
    *_, delete, _ = does.watched("rex", [])
    assert delete["interactive"]
    choice, _ = does.deleted("rex")
    assert choice["choices"] == []
    assert not (page.workspace.root / "rex").exists()
