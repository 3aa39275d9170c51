"""What the steps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.jobs import Jobs
from gsoft_diffusion.app.runs import RunView
from gsoft_diffusion.app.subjects import Subject, subject_of
from gsoft_diffusion.app.workspace import Workspace
from gsoft_diffusion.foundation.errors import UserError

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of events that only show what is so
# Of the looks at what goes on. One does not wait for the one before it: should its answer get lost, as when the network
# breaks off, the page would stand still for good.
LIVE: dict[str, Any] = QUIET | {"trigger_mode": "multiple", "concurrency_limit": None}
LOUD: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}  # of events that take a moment
# A press of a button that stands for something, by its name in `data-pick`; the keyboard presses it as well.
PICK = """element.addEventListener('click', event => {
  const picked = event.target.closest('[data-pick]');
  if (picked) trigger('click', {pick: picked.dataset.pick});
});"""


@dataclass(frozen=True)
class Page:
    """What every step works on: the page's folder and its queue."""

    workspace: Workspace
    jobs: Jobs

    def subject(self, name: str) -> Subject:
        """The subject of that name. Raises UserError if there is none, or if none is chosen."""
        if not name:
            raise UserError("first make a subject in step 1")
        return subject_of(self.workspace, name)

    def known(self, name: str | None) -> Subject | None:
        """The subject of that name, None if there is none."""
        try:
            return self.subject(name or "")
        except UserError:
            return None

    def view(self, run: str) -> RunView:
        """A run as it is now. Raises UserError if there is none of that name, in the folder or in the queue."""
        job = self.jobs.current(run, "train")
        folder = self.workspace.root / run if job else self.workspace.run(run)
        return RunView(folder, job)

    def run_folder(self, run: str) -> Path:
        """The folder of one of the runs. Raises UserError if there is none of that name, or if it has no folder."""
        folder = self.workspace.root / run
        if run not in self.runs() or folder.is_symlink() or not folder.is_dir():
            raise UserError(f"there is no run {run}")
        return folder

    def runs(self) -> list[str]:
        """The names of all runs, the latest first.

        Those included that have not written anything yet, and the last one if it failed before it did.
        """
        trainings = [job for job in self.jobs.all() if job.kind == "train"]
        there = self.workspace.runs()
        listed = [job for job in trainings if not job.ended or job.run in there]
        if trainings and trainings[-1].error():
            listed.append(trainings[-1])
        return list(dict.fromkeys([*(job.run for job in reversed(listed)), *there]))

    def adapters(self) -> list[tuple[str, str]]:
        """All adapters in the folder: what to call each, and its path below the folder; the latest runs first."""
        found = []
        for run in self.workspace.runs():
            try:
                view = self.view(run)
            except UserError:  # it was deleted at this moment
                continue
            best = view.best
            for step, path in reversed(view.adapters.items()):
                what = f"{run}, step {step}" + (" ★ best" if step == best else "")
                found.append((what, path.relative_to(self.workspace.root).as_posix()))
        return found

    def adapter(self, name: str) -> Path:
        """The path of an adapter that `adapters` names. Raises UserError for another."""
        if name not in (known for _, known in self.adapters()):
            raise UserError(f"--adapter {name}: is no adapter in this page's folder")
        return self.workspace.root / name


def says_why(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Of an event that has no place of its own for errors: a UserError becomes a message on the page.

    handler: what the event does.
    """

    @wraps(handler)
    def handled(*given: Any) -> Any:
        try:
            return handler(*given)
        except UserError as error:
            raise gr.Error(escape(str(error), quote=False), print_exception=False) from error  # it is shown as HTML

    return handled


def remembered(part: str) -> Any:
    """What a browser keeps while the page is loaded anew: the name of what was chosen last, "" at first.

    part: of the page. It stands outside of the steps, which a browser does not have until they are opened.
    """
    return gr.BrowserState("", storage_key=f"gsoft-{part}", secret="the name of a folder is none")


def remember(choice: Any, kept: Any) -> None:
    """Have the browser keep what is chosen. choice: its component. kept: as `remembered` made it."""
    choice.change(lambda name: name or gr.skip(), choice, kept, **QUIET)


@dataclass(frozen=True)
class Question:
    """A question that is asked before something is deleted.

    about: the name of what it is about. shown: the part of the page that has it. yes: the button that deletes.
    """

    about: Any
    shown: Any
    yes: Any


def ask_first(ask: Any, choice: Any, words: Callable[[str], str]) -> Question:
    """Lay out a question, which goes away when it is answered or something else is chosen.

    ask: the button that leads to it. choice: what is chosen, by its name. words: the question about a name.
    """
    about = gr.State("")
    with gr.Column(visible=False, elem_id=f"{ask.elem_id}-question") as shown:
        text = gr.HTML()
        with gr.Row():
            yes = gr.Button("Delete it", variant="stop", elem_id=f"{ask.elem_id}-yes")
            no = gr.Button("Keep it", elem_id=f"{ask.elem_id}-no")

    @says_why
    def asked(name: str) -> tuple[Any, ...]:
        return name, gr.update(visible=True), fragments.hint(words(name))

    ask.click(asked, choice, [about, shown, text], **QUIET)
    gr.on([no.click, choice.change], lambda: gr.update(visible=False), None, shown, **QUIET)
    return Question(about, shown, yes)


def choose(choices: list[Any], value: Any) -> Any:
    """An update of a choice: what there is, and what is chosen if it is there, else the first."""
    names = [choice[1] if isinstance(choice, tuple) else choice for choice in choices]
    return gr.update(choices=choices, value=value if value in names else next(iter(names), None))


def latest_of(adapters: Sequence[tuple[str, str]], run: str) -> str | None:
    """The latest adapter of a run, None if it has none. adapters: as `Page.adapters` gives them."""
    return next((name for _, name in adapters if name.startswith(f"{run}/")), None)


def updates(shown: Sequence[Any], now: Sequence[Any]) -> list[Any]:
    """Updates of what is not as it is shown, and at their end `now`, which is what is shown from then on.

    shown: what was shown at the last look; nothing at the first. now: what is to be shown, in the same order: HTML,
    and for buttons whether they do something.
    """
    before = shown or [None] * len(now)
    return [*(gr.skip() if old == new else _update(new) for old, new in zip(before, now, strict=True)), now]


def _update(value: Any) -> Any:
    return gr.update(interactive=value) if isinstance(value, bool) else value
