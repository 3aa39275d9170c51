"""Step 4: drawing with what was learned, and the gallery of what was drawn."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.fields import fields_of, held_by, marks, settings_from
from gsoft_diffusion.app.steps.common import LOUD, PICK, QUIET, Page
from gsoft_diffusion.config import GenerationConfig, SamplerConfig
from gsoft_diffusion.foundation.errors import UserError

MOST = 4  # adapters at a time, each with a slider
FIRST = ("num_images", "seed", "compare")
ELSEWHERE = (
    "adapter",
    "strength",
    "prompts",
    "prompts_file",
    "output_dir",
    "side_by_side",
    "pretrained_model_name_or_path",
)
EVERY = 3.0  # seconds between looks at what is drawn


def build(page: Page, demo: gr.Blocks, tab: gr.Tab, run: Any) -> None:
    """Lay out the step. page, demo: as in the photos' step. tab: the step's. run: the choice of a run in step 3."""
    known = page.adapters()
    gr.Markdown("Write the subject's name as in training, or `a {0} {1}`, which stands for it.")
    adapters = gr.Dropdown(
        known,
        value=[known[0][1]] if known else [],
        multiselect=True,
        max_choices=MOST,
        label="What was learned",
        info="one result or checkpoint, or several: together in one picture, or side by side",
        elem_id="adapters",
    )
    with gr.Row():
        strengths = [
            gr.Slider(0, 1.5, 1, step=0.05, label="Strength", visible=False, elem_id=f"strength-{at}")
            for at in range(MOST)
        ]
    mode = gr.Radio(
        [("all together in every picture", "together"), ("each by itself, side by side", "beside")],
        value="together",
        label="Several",
        visible=False,
        elem_id="mode",
    )
    prompts = gr.Textbox(
        lines=3, label="Prompts", info="one a line", placeholder="a {0} {1} on the beach", elem_id="prompts"
    )
    fields = fields_of(GenerationConfig, ELSEWHERE)
    fields = [*(each for each in fields if each.name in FIRST), *(each for each in fields if each.name not in FIRST)]
    with gr.Row():
        components = [each.component() for each in fields[: len(FIRST)]]
    with gr.Accordion("More settings", open=False) as more:
        components += [each.component() for each in fields[len(FIRST) :]]
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        stop = gr.Button("Stop drawing", variant="stop", interactive=False, elem_id="stop-drawing")
    said, state = (gr.HTML(elem_id=name) for name in ("draw-said", "draw-state"))
    pictures = gr.HTML(js_on_load=PICK, elem_id="pictures")
    before = gr.State([])

    def opened(name: str, chosen: list[str]) -> Any:
        there = page.adapters()
        names = [each for _, each in there]
        kept = [each for each in chosen or [] if each in names]
        return gr.update(choices=there, value=kept or _first(names, name) or names[:1])

    def followed(name: str) -> Any:
        there = page.adapters()
        return gr.update(choices=there, value=_first([each for _, each in there], name))

    def chose(chosen: list[str]) -> list[Any]:
        labels = {name: label for label, name in page.adapters()}
        sliders = [
            gr.update(
                visible=at < len(chosen), label=f"Strength of {labels.get(chosen[at], '')}" if at < len(chosen) else ""
            )
            for at in range(MOST)
        ]
        return [*sliders, gr.update(visible=len(chosen) > 1)]

    def asked(chosen: list[str], mode: str, text: str, *given: Any) -> list[Any]:
        try:
            if not chosen:
                raise UserError("choose what was learned above; it is there once a run has saved something")
            paths = [str(page.adapter(name)) for name in chosen]
            settings = settings_from(fields, given[MOST:]) | {
                "adapter": paths,
                "strength": [float(given[at]) for at in range(len(paths))],
                "prompts": [line.strip() for line in text.splitlines() if line.strip()],
            }
            if len(paths) > 1 and mode == "beside":
                settings["side_by_side"] = True
            if not settings["prompts"]:
                raise UserError("write a prompt, such as: a {0} {1} on the beach")
            GenerationConfig.from_dict(settings, "settings")
            page.jobs.add("draw", chosen[0].partition("/")[0], settings)
        except UserError as error:
            marked, rest = marks(fields, error)
            return [fragments.failure(rest or "See the setting that is marked."), gr.update(open=not rest), *marked]
        return ["", gr.skip(), *marks(fields, None)[0]]

    def watched(chosen: list[str], shown: list[Any]) -> list[Any]:
        now = _live(page, chosen)
        old = shown or [None] * len(now)
        changes = [gr.skip() if a == b else b for a, b in zip(old, now, strict=True)]
        button = gr.skip() if old[-1] == now[-1] else gr.update(interactive=now[-1])
        return [*changes[:-1], button, now]

    def stopped(chosen: list[str]) -> None:
        job = page.jobs.latest(chosen[0].partition("/")[0], "draw") if chosen else None
        if job:
            page.jobs.stop(job)

    def again(chosen: list[str], event: gr.EventData) -> list[Any]:
        view = page.view(chosen[0].partition("/")[0])
        picture = next((each for each in view.drawn if each.name == str(event.pick)), None)
        if picture is None:
            return [gr.skip()] * (MOST + 2 + len(fields))
        facts, names = picture.facts, [each for _, each in page.adapters()]
        listed = facts.get("adapters")
        made = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        there = [each for each in made if each.get("name") in names][:MOST]
        settings = {"seed": facts.get("seed"), "num_images": 1}
        sampler = facts.get("sampler")
        if isinstance(sampler, dict):
            settings |= {name: sampler.get(name) for name in SamplerConfig().to_dict()}
        settings |= {name: facts.get(name) for name in ("width", "height")}
        held = held_by(
            fields, {name: value for name, value in settings.items() if isinstance(value, str | int | float) and value}
        )
        sliders = [float(there[at].get("strength", 1)) if at < len(there) else 1 for at in range(MOST)]
        return [[each["name"] for each in there] or gr.skip(), *sliders, picture.prompt, *held]

    gr.on([demo.load, tab.select], opened, [run, adapters], adapters, **QUIET)
    run.change(followed, run, adapters, **QUIET)
    gr.on([adapters.change, demo.load], chose, adapters, [*strengths, mode], **QUIET)
    gr.on([draw.click], asked, [adapters, mode, prompts, *strengths, *components], [said, more, *components], **LOUD)
    ticks = gr.Timer(EVERY)
    gr.on([ticks.tick, adapters.change], watched, [adapters, before], [state, pictures, stop, before], **QUIET)
    stop.click(stopped, adapters, None, **LOUD)
    pictures.click(again, adapters, [adapters, *strengths, prompts, *components], **QUIET)


def _first(adapters: list[str], run: str) -> list[str]:
    """The latest adapter of a run, if it has one."""
    return [each for each in adapters if each.startswith(f"{run}/")][:1]


def _live(page: Page, chosen: list[str]) -> list[Any]:
    """How far the last drawing with the first adapter is, what was drawn, and whether there is something to stop."""
    if not chosen:
        return ["", "", False]
    run = chosen[0].partition("/")[0]
    try:
        job, view = page.jobs.latest(run, "draw"), page.view(run)
        state = ""
        if job and not job.ended:
            last = (job.lines() or ["it loads the base model"])[-1]
            state = fragments.hint(f"waits in the queue, {job.place} before it" if job.state == "waiting" else last)
        elif job:
            state = fragments.failure(job.error())
        return [state, fragments.gallery(view), job is not None and not job.ended]
    except UserError as error:
        return [fragments.failure(str(error)), "", False]
