"""Step 3: training, watched and steered. The run is a process of its own; its folder says all that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.fields import Field, fields_of, held_by, marks, settings_from
from gsoft_diffusion.app.steps.base import BaseStep, fitting_changes, settled
from gsoft_diffusion.app.steps.common import LOUD, QUIET, Page, choose
from gsoft_diffusion.app.subjects import Subject, subject_of, subjects
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE
from gsoft_diffusion.foundation.run_folder import SETTINGS

EVERY = 2.0  # seconds between looks at the run's folder, while the page is open
FIRST = ("max_train_steps", "validation_steps", "validation_prompts", "num_validation_images")  # not folded away
# What other steps decide, or a button does; `score_validation` is on wherever it can be.
ELSEWHERE = (
    *(
        "instance_data_dir",
        "class_word",
        "unique_token",
        "concepts_list",
        "pretrained_model_name_or_path",
        "output_dir",
    ),
    *("resume_from_checkpoint", "class_data_dir", "score_validation", "push_to_hub", "hub_model_id", "hub_token"),
)


@dataclass(frozen=True)
class TrainStep:
    """What other steps look at. run: the choice of a run."""

    run: Any


def build(page: Page, demo: gr.Blocks, tab: gr.Tab, subject: Any, base: BaseStep, queue: Any) -> TrainStep:
    """Lay out the step.

    page, demo: as in the photos' step. tab: the step's. subject: the choice of a subject. base: what its step says.
    queue: where the page shows what runs and what waits.
    """
    fields = fields_of(TrainingConfig, ELSEWHERE)
    first = sorted((each for each in fields if each.name in FIRST), key=lambda each: FIRST.index(each.name))
    fields = [*first, *(each for each in fields if each.name not in FIRST)]
    with gr.Row():
        components = [each.component() for each in first[:2]]
    components += [each.component() for each in first[2:3]]
    with gr.Accordion("Advanced settings", open=False, elem_id="advanced") as advanced:
        components += [each.component() for each in fields[3:]]
    with gr.Row():
        start = gr.Button("Start training", variant="primary", elem_id="start")
    said = gr.HTML(elem_id="start-said")
    runs = page.runs()
    run = gr.Dropdown(runs, value=next(iter(runs), None), label="Run", elem_id="run")
    with gr.Row():
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
        go_on = gr.Button("Go on", interactive=False, elem_id="go-on")
        draw_now = gr.Button("Draw now", interactive=False, elem_id="draw-now")
    run_said = gr.HTML(elem_id="run-said")
    headline, curve, sheets, log = (gr.HTML(elem_id=name) for name in ("headline", "curve", "sheets", "log"))
    before = gr.State([])  # what is shown, so that only what changes is sent
    live = [queue, headline, curve, sheets, log, stop, go_on, draw_now]

    def watched(name: str, shown: list[Any]) -> list[Any]:
        now = _live(page, name)
        changes = [
            gr.skip() if old == new else _update(new) for old, new in zip(shown or [None] * len(now), now, strict=True)
        ]
        return [*changes, now]

    def opened(chosen: str, name: str) -> list[Any]:
        known = subject_of(page.workspace, chosen) if chosen in subjects(page.workspace) else None
        held = dict(zip([each.name for each in fields], held_by(fields, known.settings if known else {}), strict=True))
        scenes = "\n".join(known.concept.scenes()) if known else ""
        held["validation_prompts"] = gr.update(value=held["validation_prompts"], placeholder=scenes)
        return [choose(page.runs(), name), *held.values()]

    def started(chosen: str, kind: str, base_name: str, *given: Any) -> list[Any]:
        try:
            known = _of(page, chosen)
            if known.base != (BUNDLED_BASE if kind == "bundled" else base_name.strip()):
                settled(known, kind, base_name)  # it was named, and nobody has looked at it
            settings = training_settings(known, settings_from(fields, given))
            folder = page.workspace.new_run(known.name)
            settings["output_dir"] = str(folder)
            TrainingConfig.from_dict(settings, "settings").resolved()
            page.jobs.add("train", folder.name, settings)
            known.keep({"settings": settings_from(fields, given)})
        except UserError as error:
            return _failed(fields, error)
        marked, _ = marks(fields, None)
        return [choose(page.runs(), folder.name), "", gr.skip(), *marked]

    def fitted(chosen: str, memory: str, *given: Any) -> list[Any]:
        try:
            known = _of(page, chosen)
            settings = settings_from(fields, given)
            config = TrainingConfig.from_dict(training_settings(known, settings), "settings")
            changes = fitting_changes(config, memory)
        except UserError as error:
            return ["", fragments.failure(str(error)), *[gr.skip() for _ in fields]]
        words = ", ".join(f"{name} {value}" for name, value in changes.items()) or "nothing: it fits as it is"
        return ["", fragments.hint(f"Changed in step 3: {words}."), *held_by(fields, settings | changes)]

    def stopped(name: str) -> str:
        job = page.jobs.latest(name, "train")
        if job:
            page.jobs.stop(job)
        return fragments.hint("It stops after this step, and saves what it has learned.") if job else ""

    def went_on(name: str, *given: Any) -> list[Any]:
        try:
            path = page.view(name).folder / SETTINGS
            if not path.is_file():
                raise UserError(f"{name} has not begun, so it cannot go on; start it anew")
            steps = settings_from(first[:1], given[:1])
            settings = read_yaml(path) | steps | {"resume_from_checkpoint": "latest"}
            TrainingConfig.from_dict(settings, "settings")
            page.jobs.add("train", name, settings)
        except UserError as error:
            return _failed(fields, error)
        return [gr.skip(), "", gr.skip(), *marks(fields, None)[0]]

    def drawn(name: str) -> str:
        job = page.jobs.latest(name, "train")
        if job:
            page.jobs.draw_now(job)
        return fragments.hint("It draws after this step.")

    outcome = [run, said, advanced, *components]
    gr.on([demo.load, subject.change], opened, [subject, run], [run, *components], **QUIET)
    tab.select(lambda name: choose(page.runs(), name), run, run, **QUIET)
    ticks = gr.Timer(EVERY)
    gr.on([ticks.tick, run.change], watched, [run, before], [*live, before], concurrency_limit=None, **QUIET)
    start.click(started, [subject, base.kind, base.name, *components], outcome, **LOUD)
    base.fit.click(fitted, [subject, base.memory, *components], [said, base.said, *components], **LOUD)
    stop.click(stopped, run, run_said, **LOUD)
    go_on.click(went_on, [run, *components], outcome, **LOUD)
    draw_now.click(drawn, run, run_said, **LOUD)
    return TrainStep(run)


def training_settings(subject: Subject, given: dict[str, Any]) -> dict[str, Any]:
    """A run's settings: those given, what the subject decides, and a checkpoint for every sheet unless told otherwise.

    subject: in the page's folder. given: settings by name. Raises UserError if it has no photos, or as `read_folder`.
    """
    photos = subject.seen()
    if not photos:
        raise UserError(f"{subject.name} has no photos yet; drop some in step 1")
    settings: dict[str, Any] = {
        "instance_data_dir": str(subject.photos),
        "class_word": subject.class_word,
        "unique_token": subject.token,
        "pretrained_model_name_or_path": subject.base,
    }
    if len(photos) > 1 and given.get("num_validation_images") != 0:
        settings["score_validation"] = True
    if "validation_steps" in given and "checkpointing_steps" not in given:
        settings["checkpointing_steps"] = given["validation_steps"]
    return settings | given


def _of(page: Page, name: str) -> Subject:
    if not name:
        raise UserError("first make a subject in step 1")
    return subject_of(page.workspace, name)


def _failed(fields: Sequence[Field], error: UserError) -> list[Any]:
    """Updates of the run's choice, the line below the button, the folded settings and each of the fields."""
    marked, rest = marks(fields, error)
    return [gr.skip(), fragments.failure(rest or "See the setting that is marked."), gr.update(open=True), *marked]


def _live(page: Page, name: str) -> list[Any]:
    """What is shown of the queue and a run: HTML, and for each button whether it does something."""
    strip = fragments.queue(page.jobs.all())
    if not name:
        return [strip, "", "", "", "", False, False, False]
    try:
        view = page.view(name)
        job = view.job
        return [
            strip,
            fragments.headline(view),
            fragments.loss_curve(view.numbers),
            fragments.sheets(view),
            fragments.log_tail(job),
            job is not None and not job.ended,
            job is not None and job.ended,
            view.trains,
        ]
    except UserError as error:
        return [strip, fragments.failure(str(error)), "", "", "", False, False, False]


def _update(shown: Any) -> Any:
    return gr.update(interactive=shown) if isinstance(shown, bool) else shown
