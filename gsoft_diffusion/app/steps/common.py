"""What the steps share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from gsoft_diffusion.app.jobs import Jobs
from gsoft_diffusion.app.runs import RunView
from gsoft_diffusion.app.workspace import Workspace
from gsoft_diffusion.foundation.errors import UserError

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of events that only show what is so
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

    def view(self, run: str) -> RunView:
        """A run as it is now. Raises UserError if there is none of that name, in the folder or in the queue."""
        job = self.jobs.latest(run, "train")
        folder = self.workspace.root / job.run if job and job.run == run else self.workspace.run(run)
        return RunView(folder, job)

    def runs(self) -> list[str]:
        """The names of all runs, those included that have not written anything yet; the latest first."""
        waiting = [job.run for job in reversed(self.jobs.all()) if job.kind == "train"]
        return list(dict.fromkeys([*waiting, *self.workspace.runs()]))

    def adapters(self) -> list[tuple[str, str]]:
        """All adapters in the folder: what to call each, and its path below the folder; the latest runs first."""
        found = []
        for run in self.workspace.runs():
            view = self.view(run)
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


def choose(choices: list[Any], value: Any) -> Any:
    """An update of a choice: what there is, and what is chosen if it is there, else the first."""
    names = [choice[1] if isinstance(choice, tuple) else choice for choice in choices]
    return gr.update(choices=choices, value=value if value in names else next(iter(names), None))
