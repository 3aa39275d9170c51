"""Step 5: taking home what was learned, in the formats of other programs."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.files import download_address
from gsoft_diffusion.app.jobs import Job
from gsoft_diffusion.app.runs import RunView
from gsoft_diffusion.app.steps.common import LOUD, QUIET, Page, choose, latest_of, updates
from gsoft_diffusion.config import ExportConfig
from gsoft_diffusion.foundation.errors import UserError

EVERY = 3.0  # seconds between looks at what was made
FORMATS = {
    "kohya_lora": "LoRA for ComfyUI, A1111 and Forge: small, loses a little",
    "checkpoint": "whole model in one file, for ComfyUI, A1111 and Forge: large, loses nothing",
    "diff": "full differences, for ComfyUI, A1111 and Forge: large, mixes with LoRAs, loses nothing at strength 1",
    "diffusers": "whole model as a folder, for diffusers: large, loses nothing",
    "diffusers_lora": "LoRA for diffusers: small, loses a little",
}
GOES = {  # by the beginnings of names of files
    "adapter": "to gsoft-draw here or elsewhere, with the same base model, or into ComfyUI and Forge with their "
    "node pack (comfyui/README.md); it is exact, and small",
    "kohya_lora": "into ComfyUI/models/loras (node Load LoRA), or models/Lora of A1111 and Forge",
    "diffusers_lora": "to pipeline.load_lora_weights in diffusers",
    "diff": "where a LoRA goes: ComfyUI/models/loras, or models/Lora of A1111 and Forge",
    "merged/": "to DiffusionPipeline.from_pretrained in diffusers, or ComfyUI/models/diffusers",
    "merged": "into ComfyUI/models/checkpoints (node Load Checkpoint), or models/Stable-diffusion of A1111 and Forge",
}


def build(page: Page, demo: gr.Blocks, tab: gr.Tab, run: Any) -> None:
    """Lay out the step. page, demo: as in the photos' step. tab: the step's. run: the choice of a run in step 3."""
    known = page.adapters()
    adapter = gr.Dropdown(known, value=known[0][1] if known else None, label="What was learned", elem_id="take-adapter")
    kind = gr.Radio(
        [(text, name) for name, text in FORMATS.items()], value="kohya_lora", label="Make it into", elem_id="format"
    )
    with gr.Row():
        rank = gr.Slider(
            4, 256, 64, step=4, label="Rank of a LoRA", info="higher is nearer to what was learned, and larger"
        )
        precision = gr.Radio(["float16", "float32"], value="float16", label="Precision")
    make = gr.Button("Make it", variant="primary", elem_id="make")
    said, state, files = (gr.HTML(elem_id=name) for name in ("take-said", "take-state", "files"))
    with gr.Accordion("The model card", open=False, elem_id="card"):
        words = gr.Markdown()
    before = gr.State([])

    def opened(name: str, chosen: str | None) -> Any:
        there = page.adapters()
        return choose(there, chosen if chosen in [each for _, each in there] else latest_of(there, name))

    def followed(name: str) -> Any:
        there = page.adapters()
        return choose(there, latest_of(there, name))

    def asked(chosen: str | None, kind: str, rank: int, precision: str) -> str:
        try:
            if not chosen:
                raise UserError("choose what was learned above; it is there once a run has saved something")
            settings: dict[str, Any] = {"adapter": [str(page.adapter(chosen))], "format": kind, "precision": precision}
            if kind.endswith("_lora"):
                settings["rank"] = int(rank)
            ExportConfig.from_dict(settings, "settings")
            page.jobs.add("export", chosen.partition("/")[0], settings)
        except UserError as error:
            return fragments.failure(str(error))
        return ""

    def watched(chosen: str | None, shown: list[Any]) -> list[Any]:
        return updates(shown, _live(page, chosen))

    gr.on([demo.load, tab.select], opened, [run, adapter], adapter, **QUIET)
    run.change(followed, run, adapter, **QUIET)
    make.click(asked, [adapter, kind, rank, precision], said, **LOUD)
    ticks = gr.Timer(EVERY)
    gr.on([ticks.tick, adapter.change], watched, [adapter, before], [state, files, words, before], **QUIET)


def _live(page: Page, chosen: str | None) -> list[Any]:
    """How far the last export is, what can be downloaded, and the model card."""
    if not chosen:
        return ["", "", ""]
    run = chosen.partition("/")[0]
    try:
        view, job = page.view(run), page.jobs.latest(run, "export")
        return [_state(job), _files(view, chosen.partition("/")[2]), _card(view)]
    except UserError as error:
        return [fragments.failure(str(error)), "", ""]


def _state(job: Job | None) -> str:
    if job is None:
        return ""
    if not job.ended:
        last = (job.lines() or ["it loads the base model"])[-1]
        return fragments.hint(f"waits in the queue, {job.place} before it" if job.state == "waiting" else last)
    notes = [line for line in job.lines() if line.startswith("note: ")] if job.state == "done" else []
    return fragments.failure(job.error()) + "".join(map(fragments.hint, notes))


def _files(view: RunView, adapter: str) -> str:
    rows = []
    for name in [adapter, *view.exports]:
        path = view.folder / name
        size = (
            sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
            if name.endswith("/")
            else path.stat().st_size
        )
        stem = Path(name).name + ("/" if name.endswith("/") else "")
        goes = next(
            text for start, text in GOES.items() if (stem if "/" in start else Path(name).name).startswith(start)
        )
        shown = f"{name.rstrip('/')}.zip" if name.endswith("/") else name
        rows.append(
            f'<tr><td><a href="{escape(download_address(view.name, name))}" download>{escape(shown)}</a></td>'
            f"<td>{size / 1e6:,.1f} MB</td><td>{escape(goes)}</td></tr>"
        )
    return f'<table class="take">{"".join(rows)}</table>'


def _card(view: RunView) -> str:
    """The card without its pictures, whose places mean nothing here."""
    return re.sub(r"!\[[^\]]*\]\([^)]*\)", "", view.card)
