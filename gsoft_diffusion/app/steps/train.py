"""Step 3: training, watched and steered. The run is a process of its own; its folder says all that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.fields import Field, fields_of, held_by, marks, settings_from
from gsoft_diffusion.app.steps.base import BaseStep, fitting_changes, settled
from gsoft_diffusion.app.steps.common import LIVE, LOUD, QUIET, Page, ask_first, choose, remember, says_why, updates
from gsoft_diffusion.app.subjects import Subject, with_token
from gsoft_diffusion.app.typed import Typed
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE
from gsoft_diffusion.foundation.run_folder import SETTINGS

EVERY = 2.0  # seconds between looks at the run's folder, while the page is open
PROMPTS = ("instance_prompt", "validation_prompts")  # in which the subject's name may stand
CONTINUED = ("max_train_steps", "accept_changes")  # what counts of the fields when a run goes on
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
    *("base_config", "validation_data_dir"),  # the page reads nothing outside of its folder but the base model
    *("resume_from_checkpoint", "class_data_dir", "score_validation", "push_to_hub", "hub_model_id", "hub_token"),
)


@dataclass(frozen=True)
class TrainStep:
    """What other steps look at.

    run: the choice of a run. prompts: fields that may have the subject's name in them. started: the event after which
    the subject may have another base model, as it was named in step 2 and not used yet. typed: what is in the fields.
    """

    run: Any
    prompts: Sequence[Any]
    started: Any
    typed: Typed


def build(page: Page, demo: gr.Blocks, tab: gr.Tab, subject: Any, base: BaseStep, queue: Any, before: Any) -> TrainStep:
    """Lay out the step.

    page, demo: as in the photos' step. tab: the step's. subject: the choice of a subject. base: what its step says.
    queue: where the page shows what runs and what waits. before: the run that was chosen last.
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
    run = gr.Dropdown(page.runs(), value=None, label="Run", elem_id="run")
    remember(run, before)
    with gr.Row():
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
        go_on = gr.Button("Go on", interactive=False, elem_id="go-on")
        draw_now = gr.Button("Draw now", interactive=False, elem_id="draw-now")
        delete = gr.Button("Delete…", interactive=False, elem_id="delete-run")
    does = Handlers(page, fields)
    question = ask_first(delete, run, does.before_deleting)
    headline, curve, sheets, notes = (gr.HTML(elem_id=name) for name in ("headline", "curve", "sheets", "notes"))
    with gr.Accordion("Its log", open=False, elem_id="log"):
        log = gr.HTML()
    shown = gr.State([])  # so that only what changes is sent
    live = [queue, headline, curve, sheets, notes, log, stop, go_on, draw_now, delete]

    outcome = [run, said, advanced, *components]
    demo.load(does.opened, before, run, **QUIET)
    typed = Typed("settings", dict(zip([each.name for each in fields], components, strict=True)), [subject])
    typed.show(demo.load)
    typed.wait(subject.change)
    typed.show(subject.change(does.changed, subject, components, **QUIET).then)
    # The step may be opened before what was chosen last is shown.
    tab.select(lambda name, last: does.opened(name or last), [run, before], run, **QUIET)
    ticks = gr.Timer(EVERY)
    gr.on([ticks.tick, run.change], does.watched, [run, shown], [*live, shown], **LIVE)
    started = start.click(does.started, [subject, base.kind, base.name, *components], outcome, **LOUD)
    fitted = base.fit.click(does.fitted, [subject, base.memory, *components], [said, base.said, *components], **LOUD)
    typed.hold(fitted.then)
    stop.click(does.stopped, run, None, **LOUD)
    go_on.click(does.went_on, [run, *components], outcome, **LOUD)
    draw_now.click(does.drawn, run, None, **LOUD)
    question.yes.click(does.deleted, question.about, [run, question.shown], **LOUD)
    prompts = [held for field, held in zip(fields, components, strict=True) if field.name in PROMPTS]
    return TrainStep(run, prompts, started, typed)


@dataclass(frozen=True)
class Handlers:
    """What the step's events do. Each takes what components hold, and returns updates of components.

    page: as in `build`. fields: of the settings, the number of steps first.
    """

    page: Page
    fields: Sequence[Field]

    def watched(self, name: str, shown: list[Any]) -> list[Any]:
        """Time has passed, or another run is chosen. name: of the run. shown: as `updates` returned it."""
        return updates(shown, _live(self.page, name))

    def opened(self, name: str) -> Any:
        """The page or the step is opened. name: of the run that was chosen last."""
        return choose(self.page.runs(), name)

    def changed(self, chosen: str) -> list[Any]:
        """Another subject is chosen: its settings. chosen: the subject."""
        known = self.page.known(chosen)
        held = dict(
            zip([each.name for each in self.fields], held_by(self.fields, known.settings if known else {}), strict=True)
        )
        scenes = "\n".join(known.concept.scenes()) if known else ""
        held["validation_prompts"] = gr.update(value=held["validation_prompts"], placeholder=scenes)
        return list(held.values())

    def started(self, chosen: str, kind: str, base_name: str, *given: Any) -> list[Any]:
        """*Start training* is pressed.

        chosen: the subject. kind, base_name: of the base model, as in `settled`. given: what the fields hold.
        """
        try:
            known = self.page.subject(chosen)
            token = known.token
            if known.base != (BUNDLED_BASE if kind == "bundled" else base_name.strip()):
                settled(known, kind, base_name)  # it was named, and is not used yet
            chosen_settings = with_token(settings_from(self.fields, given), token, known.token)
            chosen_settings.pop("accept_changes", None)  # it is for *Go on*
            settings = training_settings(known, chosen_settings)
            folder = self.page.workspace.new_run(known.name)
            settings["output_dir"] = str(folder)
            TrainingConfig.from_dict(settings, "settings").resolved()
            self.page.jobs.add("train", folder.name, settings)
            known.keep({"settings": chosen_settings})
        except UserError as error:
            return _failed(self.fields, error)
        marked, _ = marks(self.fields, None)
        return [choose(self.page.runs(), folder.name), "", gr.skip(), *marked]

    def fitted(self, chosen: str, memory: str, *given: Any) -> list[Any]:
        """The button of step 2 that makes training fit is pressed.

        chosen: the subject. memory: as in `fitting_changes`. given: what the fields hold.
        """
        try:
            known = self.page.subject(chosen)
            settings = settings_from(self.fields, given)
            config = TrainingConfig.from_dict(training_settings(known, settings), "settings")
            changes = fitting_changes(config, memory)
        except UserError as error:
            return ["", fragments.failure(str(error)), *[gr.skip() for _ in self.fields]]
        words = ", ".join(f"{name} {value}" for name, value in changes.items()) or "nothing: it fits as it is"
        held = zip(self.fields, held_by(self.fields, settings | changes), strict=True)
        # The others may be typed into at this moment.
        fields = [value if field.name in changes else gr.skip() for field, value in held]
        return ["", fragments.hint(f"Changed in step 3: {words}."), *fields]

    @says_why
    def stopped(self, name: str) -> None:
        """*Stop* is pressed. name: of the run."""
        view = self.page.view(name)
        if view.job is None or view.job.ended:
            return
        stuck = view.silence is not None
        if not self.page.jobs.stop(view.job, at_once=stuck):
            gr.Info("It is stopping already. If it says nothing for minutes, press once more: it then ends unsaved.")
        elif view.job.state == "waiting":
            gr.Info("It is taken out of the queue.")
        elif stuck:
            gr.Info("It ends without saving; its last checkpoint stays.")
        elif view.trains:
            gr.Info("It stops after this step, and saves what it has learned.")
        else:
            gr.Info("It ends before its next step.")

    def went_on(self, name: str, *given: Any) -> list[Any]:
        """*Go on* is pressed. name: of the run. given: what the fields hold, of which `CONTINUED` count."""
        try:
            view = self.page.view(name)
            folder = view.folder  # which may have another name or place than when the run began
            if view.job and not view.job.ended:
                raise UserError(f"{name} is in the queue already")
            if not (folder / SETTINGS).is_file():
                raise UserError(f"{name} has not begun, so it cannot go on; start it anew")
            continued = {each: held for each, held in zip(self.fields, given, strict=True) if each.name in CONTINUED}
            settings = read_yaml(folder / SETTINGS)
            settings.pop("accept_changes", None)  # those of the last time
            settings |= settings_from(tuple(continued), tuple(continued.values()))
            settings |= {"output_dir": str(folder), "resume_from_checkpoint": "latest"}
            TrainingConfig.from_dict(settings, "settings")
            self.page.jobs.add("train", name, settings)
        except UserError as error:
            return _failed(self.fields, error)
        return [gr.skip(), "", gr.skip(), *marks(self.fields, None)[0]]

    @says_why
    def drawn(self, name: str) -> None:
        """*Draw now* is pressed. name: of the run."""
        view = self.page.view(name)
        if view.job is None or not view.trains:
            raise UserError("it has not done a step since it was started; ask again once it has")
        self.page.jobs.draw_now(view.job)
        gr.Info("It draws after this step.")

    def before_deleting(self, name: str) -> str:
        """What is asked before a run is deleted. name: of the run. Raises UserError if there is none."""
        size = 0
        for path in self.page.run_folder(name).rglob("*"):
            with suppress(OSError):  # a run goes on writing, and deletes old checkpoints
                size += path.lstat().st_size
        return (
            f"Delete the run {name} with its adapters, checkpoints, pictures and exports, {size / 1e6:,.0f} MB? "
            "The subject and its photos stay. This cannot be undone."
        )

    @says_why
    def deleted(self, name: str) -> tuple[Any, ...]:
        """The question is answered by yes. name: of the run that it was about."""
        self.page.jobs.delete(self.page.run_folder(name))
        gr.Info(escape(f"{name} is deleted."))
        return choose(self.page.runs(), None), gr.update(visible=False)


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
    if every := given.get("validation_steps", TrainingConfig.validation_steps):
        settings["checkpointing_steps"] = every
    return settings | given


def _failed(fields: Sequence[Field], error: UserError) -> list[Any]:
    """Updates of the run's choice, the line below the button, the folded settings and each of the fields."""
    marked, rest = marks(fields, error)
    return [gr.skip(), fragments.failure(rest or "See the setting that is marked."), gr.update(open=True), *marked]


def _live(page: Page, name: str) -> list[Any]:
    """What is shown of the queue and a run: HTML, and for each button whether it does something."""
    strip = fragments.queue(page.jobs.all())
    if not name:
        return [strip, "", "", "", "", "", False, False, False, False]
    try:
        view = page.view(name)
        job = view.job
        idle = job is None or job.ended
        return [
            strip,
            fragments.headline(view),
            fragments.loss_curve(view.numbers),
            fragments.sheets(view),
            fragments.notes(job),
            fragments.log_tail(job),
            not idle,
            idle and (view.folder / SETTINGS).is_file(),
            view.trains,
            idle and view.folder.is_dir(),
        ]
    except UserError as error:
        return [strip, fragments.failure(str(error)), "", "", "", "", False, False, False, False]
