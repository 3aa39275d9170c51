"""Step 5: taking home what was learned, in the formats of other programs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.adapters.loading import family_of_base
from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.fields import fields_of
from gsoft_diffusion.app.files import download_address
from gsoft_diffusion.app.jobs import Job
from gsoft_diffusion.app.runs import RunView
from gsoft_diffusion.app.steps.common import LIVE, LOUD, QUIET, Page, choose, latest_of, updates
from gsoft_diffusion.config import ExportConfig
from gsoft_diffusion.config.export import DEFAULT_RANK, default_output
from gsoft_diffusion.foundation.errors import UserError

EVERY = 3.0  # seconds between looks at what was made
FORMATS = {
    "kohya_lora": "LoRA for ComfyUI and Forge: small, loses a part of what was learned",
    "checkpoint": "whole model in one file, for ComfyUI and Forge: large, loses nothing",
    "diff": "full differences, for ComfyUI and Forge: large, mixes with LoRAs, loses nothing at strength 1",
    "diffusers": "whole model as a folder, for diffusers: large, loses nothing",
    "diffusers_lora": "LoRA for diffusers: small, loses a part of what was learned",
}
GOES = {  # by the beginnings of names of files
    "adapter": "to gsoft-draw here or elsewhere, with the same base model, or into ComfyUI and Forge with their "
    "node pack (comfyui/README.md); it is exact, and small",
    "kohya_lora": "into ComfyUI/models/loras (node Load LoRA), or models/Lora of Forge",
    "diffusers_lora": "to pipeline.load_lora_weights in diffusers",
    "diff": "where a LoRA goes: ComfyUI/models/loras, or models/Lora of Forge",
    "merged": "into ComfyUI/models/checkpoints (node Load Checkpoint), or models/Stable-diffusion of Forge",
}
PRECISION = next(each for each in fields_of(ExportConfig, ()) if each.name == "precision")
FOLDER_GOES = "to DiffusionPipeline.from_pretrained in diffusers, or ComfyUI/models/diffusers"


def build(page: Page, demo: gr.Blocks, tab: gr.Tab, run: Any) -> None:
    """Lay out the step. page, demo: as in the photos' step. tab: the step's. run: the choice of a run in step 3."""
    adapter = gr.Dropdown(page.adapters(), value=None, label="What was learned", elem_id="take-adapter")
    kind = gr.Radio(_choices(FORMATS), value="kohya_lora", label="Make it into", elem_id="format")
    with gr.Row():
        rank = gr.Slider(
            4,
            256,
            DEFAULT_RANK,
            step=4,
            label="Rank of a LoRA",
            info="higher is nearer to what was learned, and larger",
        )
        precision = gr.Radio(
            PRECISION.choices, value=PRECISION.default, label=PRECISION.label, info=PRECISION.help, elem_id="precision"
        )
    with gr.Row():
        make = gr.Button("Make it", variant="primary", elem_id="make")
        stop = gr.Button("Stop making it", variant="stop", interactive=False, elem_id="stop-making")
    said, state, files = (gr.HTML(elem_id=name) for name in ("take-said", "take-state", "files"))
    with gr.Accordion("The model card", open=False, elem_id="card"):
        words = gr.Markdown()
    before = gr.State([])

    does = Handlers(page)
    gr.on([demo.load, tab.select], does.opened, [run, adapter], adapter, **QUIET)
    run.change(does.followed, run, adapter, **QUIET)
    gr.on([demo.load, adapter.change], does.offered, [adapter, kind], kind, **QUIET)
    make.click(does.asked, [adapter, kind, rank, precision], said, **LOUD)
    stop.click(does.stopped, adapter, None, **LOUD)
    ticks = gr.Timer(EVERY)
    gr.on([ticks.tick, adapter.change], does.watched, [adapter, before], [state, files, words, stop, before], **LIVE)


@dataclass(frozen=True)
class Handlers:
    """What the step's events do. Each takes what components hold, and returns updates of components."""

    page: Page

    def opened(self, name: str, chosen: str | None) -> Any:
        """The step is opened. name: of the run in step 3. chosen: the adapter's name."""
        there = self.page.adapters()
        return choose(there, chosen if chosen in [each for _, each in there] else latest_of(there, name))

    def followed(self, name: str) -> Any:
        """Another run is chosen in step 3. name: of the run."""
        there = self.page.adapters()
        return choose(there, latest_of(there, name))

    def offered(self, chosen: str | None, kind: str) -> Any:
        """An adapter is chosen. chosen: its name. kind: the format. Offers those that its base model can have."""
        formats = _formats(self.page, chosen) if chosen else list(FORMATS)
        return gr.update(choices=_choices(formats), value=kind if kind in formats else formats[0])

    def asked(self, chosen: str | None, kind: str, rank: int, precision: str) -> str:
        """*Make it* is pressed. chosen: the adapter's name. kind: the format. rank: a LoRA's. precision: of numbers."""
        try:
            if not chosen:
                raise UserError("choose what was learned above; it is there once a run has saved something")
            path, run = self.page.adapter(chosen), chosen.partition("/")[0]
            step = next(step for step, there in self.page.view(run).adapters.items() if there == path)
            made_of = f"step-{step}" + ("" if precision == PRECISION.default else f"_{precision}")
            target = default_output(path, kind, int(rank), made_of)
            if target.exists():
                return fragments.hint(f"{target.name} is there already, below.")
            under_way = [job.settings().get("output") for job in self.page.jobs.about(run, "export") if not job.ended]
            if str(target) in under_way:
                return fragments.hint(f"{target.name} is being made already.")
            settings: dict[str, Any] = {"adapter": [str(path)], "format": kind, "precision": precision}
            settings["output"] = str(target)
            if kind.endswith("_lora"):
                settings["rank"] = int(rank)
            ExportConfig.from_dict(settings, "settings")
            self.page.jobs.add("export", run, settings)
        except UserError as error:
            return fragments.failure(str(error))
        return ""

    def stopped(self, chosen: str | None) -> None:
        """*Stop making it* is pressed. chosen: the adapter's name."""
        job = self.page.jobs.current(chosen.partition("/")[0], "export") if chosen else None
        if job:
            self.page.jobs.stop(job, at_once=True)  # a file is there completely or not at all

    def watched(self, chosen: str | None, shown: list[Any]) -> list[Any]:
        """Time has passed, or another adapter is chosen. chosen: its name. shown: as `updates` returned it."""
        return updates(shown, _live(self.page, chosen))


def _choices(formats: Iterable[str]) -> list[tuple[str, str]]:
    return [(FORMATS[name], name) for name in formats]


def _formats(page: Page, chosen: str) -> list[str]:
    """The formats that an adapter can be exported in; all if its base model is not to be found."""
    try:
        family = family_of_base(read_adapter(page.adapter(chosen)))
    except UserError:  # the export will say what is wrong
        return list(FORMATS)
    found = []
    for name in FORMATS:
        with suppress(UserError):
            family.check_format(name)
            found.append(name)
    return found


def _live(page: Page, chosen: str | None) -> list[Any]:
    """How far an export is, what can be downloaded, the model card, and whether there is something to stop."""
    if not chosen:
        return ["", "", "", False]
    run = chosen.partition("/")[0]
    try:
        view, jobs = page.view(run), page.jobs.about(run, "export")
        latest = {_name(job): job for job in jobs if job.state != "withdrawn"}
        state = "".join(_state(job, view.folder) for job in latest.values())
        return [state, _files(view, chosen.partition("/")[2]), _card(view), any(not job.ended for job in jobs)]
    except UserError as error:
        return [fragments.failure(str(error)), "", "", False]


def _state(job: Job, folder: Path) -> str:
    """What an export says: how far it is, or once it has ended what came of it."""
    if not job.ended:
        return fragments.hint(f"{_name(job)}: {fragments.under_way(job)}")
    place = f"{folder}/"  # a line of what was written there begins with it
    said = [line.removeprefix(place) for line in job.lines() if line.startswith(("note: ", place))]
    wrong = fragments.failure(f"{_name(job)}: {why}") if (why := job.error()) else ""
    return wrong + ("".join(map(fragments.hint, said)) if job.state == "done" else "")


def _name(job: Job) -> str:
    """Of the file or folder that an export makes."""
    return Path(str(job.settings().get("output"))).name


def _files(view: RunView, adapter: str) -> str:
    rows = []
    for name in [adapter, *view.exports]:
        path = view.folder / name
        parts = [each for each in path.rglob("*") if each.is_file()] if name.endswith("/") else [path]
        try:
            size = sum(each.stat().st_size for each in parts)
        except OSError:  # it went away, as checkpoints do
            continue
        stem = Path(name).name
        goes = (
            FOLDER_GOES if name.endswith("/") else next(text for start, text in GOES.items() if stem.startswith(start))
        )
        shown = f"{name.rstrip('/')}.zip" if name.endswith("/") else name
        rows.append(
            f'<tr><td><a href="{escape(download_address(view.name, name))}" download>{escape(shown)}</a></td>'
            f"<td>{size / 1e6:,.1f} MB</td><td>{escape(goes)}</td></tr>"
        )
    known = fragments.hint("Not every program reads every kind of model: the model card says which.")
    return f'<table class="take">{"".join(rows)}</table>{known if len(rows) > 1 else ""}'


def _card(view: RunView) -> str:
    """The card without its pictures, whose places mean nothing here, and what is said of them."""
    return re.sub(r"!\[[^\]]*\]\([^)]*\)\n\n\*[^*\n]*\*", "", view.card)
