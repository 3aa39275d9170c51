"""Step 4: drawing with what was learned, and the gallery of what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.fields import Field, fields_of, held_by, marks, settings_from
from gsoft_diffusion.app.steps.common import LIVE, LOUD, PICK, QUIET, Page, latest_of, says_why, updates
from gsoft_diffusion.app.typed import Typed
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
    "variant",
    "base_config",
)
EVERY = 3.0  # seconds between looks at what is drawn


def build(page: Page, demo: gr.Blocks, tab: gr.Tab, run: Any) -> None:
    """Lay out the step. page, demo: as in the photos' step. tab: the step's. run: the choice of a run in step 3."""
    gr.Markdown("Write the subject's name as in training, or `a {0} {1}`, which stands for it.")
    adapters = gr.Dropdown(
        page.adapters(),
        value=[],
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

    does = Handlers(page, fields)
    gr.on([demo.load, tab.select], does.opened, [run, adapters], adapters, **QUIET)
    run.change(does.followed, run, adapters, **QUIET)
    gr.on([adapters.change, demo.load], does.chose, adapters, [*strengths, mode], **QUIET)
    gr.on(
        [draw.click], does.asked, [adapters, mode, prompts, *strengths, *components], [said, more, *components], **LOUD
    )
    ticks = gr.Timer(EVERY)
    gr.on([ticks.tick, adapters.change], does.watched, [adapters, before], [state, pictures, stop, before], **LIVE)
    stop.click(does.stopped, adapters, None, **LOUD)
    again = pictures.click(does.again, adapters, [adapters, *strengths, mode, prompts, *components], **QUIET)
    typed = Typed("drawing", {"prompts": prompts, **dict(zip([each.name for each in fields], components, strict=True))})
    typed.show(demo.load)
    typed.hold(again.then)


@dataclass(frozen=True)
class Handlers:
    """What the step's events do. Each takes what components hold, and returns updates of components.

    page: as in `build`. fields: of the settings.
    """

    page: Page
    fields: Sequence[Field]

    def opened(self, name: str, chosen: list[str]) -> Any:
        """The step is opened. name: of the run in step 3. chosen: the adapters' names."""
        there = self.page.adapters()
        names = [each for _, each in there]
        kept = [each for each in chosen or [] if each in names]
        latest = latest_of(there, name)
        return gr.update(choices=there, value=kept or ([latest] if latest else names[:1]))

    def followed(self, name: str) -> Any:
        """Another run is chosen in step 3. name: of the run."""
        there = self.page.adapters()
        latest = latest_of(there, name)
        return gr.update(choices=there, value=[latest] if latest else [])

    def chose(self, chosen: list[str]) -> list[Any]:
        """Other adapters are chosen. chosen: their names."""
        labels = {name: label for label, name in self.page.adapters()}
        sliders = [
            gr.update(
                visible=at < len(chosen), label=f"Strength of {labels.get(chosen[at], '')}" if at < len(chosen) else ""
            )
            for at in range(MOST)
        ]
        return [*sliders, gr.update(visible=len(chosen) > 1)]

    def asked(self, chosen: list[str], mode: str, text: str, *given: Any) -> list[Any]:
        """*Draw* is pressed.

        chosen: the adapters' names. mode: `together` or `beside`. text: the prompts. given: the strengths, then what
        the fields hold.
        """
        try:
            if not chosen:
                raise UserError("choose what was learned above; it is there once a run has saved something")
            paths = [str(self.page.adapter(name)) for name in chosen]
            settings = settings_from(self.fields, given[MOST:]) | {
                "adapter": paths,
                "strength": [float(given[at]) for at in range(len(paths))],
                "prompts": [line.strip() for line in text.splitlines() if line.strip()],
            }
            if len(paths) > 1 and mode == "beside":
                settings["side_by_side"] = True
            if not settings["prompts"]:
                raise UserError("write a prompt, such as: a {0} {1} on the beach")
            GenerationConfig.from_dict(settings, "settings")
            self.page.jobs.add("draw", chosen[0].partition("/")[0], settings)
        except UserError as error:
            marked, rest = marks(self.fields, error)
            return [fragments.failure(rest or "See the setting that is marked."), gr.update(open=not rest), *marked]
        return ["", gr.skip(), *marks(self.fields, None)[0]]

    def watched(self, chosen: list[str], shown: list[Any]) -> list[Any]:
        """Time has passed, or other adapters are chosen. chosen: their names. shown: as `updates` returned it."""
        return updates(shown, _live(self.page, chosen))

    def stopped(self, chosen: list[str]) -> None:
        """*Stop drawing* is pressed. chosen: the adapters' names."""
        job = self.page.jobs.current(chosen[0].partition("/")[0], "draw") if chosen else None
        if job:
            self.page.jobs.stop(job, at_once=True)  # every picture is saved when it is drawn

    @says_why
    def again(self, chosen: list[str], event: gr.EventData) -> list[Any]:
        """*Draw again with…* is pressed below a picture.

        chosen: the adapters' names. event: its `pick` is the picture's name.
        """
        drawn = self.page.view(chosen[0].partition("/")[0]).drawn if chosen else []
        picture = next((each for group in drawn for each in group if each.name == str(event.pick)), None)
        if picture is None:
            raise UserError("that picture is not there any more")
        facts, known = picture.facts, [each for _, each in self.page.adapters()]
        listed = facts.get("adapters")
        made = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        there = [each for each in made if each.get("name") in known][:MOST]
        settings = {"seed": facts.get("seed"), "num_images": 1}
        sampler = facts.get("sampler")
        if isinstance(sampler, dict):
            settings |= {name: sampler.get(name) for name in SamplerConfig().to_dict()}
        settings |= {name: facts.get(name) for name in ("width", "height")}
        held = held_by(
            self.fields,
            {name: value for name, value in settings.items() if isinstance(value, str | int | float)},
        )
        sliders = [float(there[at].get("strength", 1)) if at < len(there) else 1 for at in range(MOST)]
        names = [each["name"] for each in there]
        mode = "together" if len(names) > 1 else gr.skip()  # one by itself has one adapter in its file
        return [names or gr.skip(), *sliders, mode, picture.prompt, *held]


def _live(page: Page, chosen: list[str]) -> list[Any]:
    """How far drawing with the first adapter is, what was drawn, and whether there is something to stop."""
    if not chosen:
        return ["", "", False]
    run = chosen[0].partition("/")[0]
    try:
        job, view = page.jobs.current(run, "draw"), page.view(run)
        state = ""
        if job and not job.ended:
            state = fragments.hint(fragments.under_way(job))
        elif job:
            state = fragments.hint("stopped") if job.state == "stopped" else fragments.failure(job.error())
        return [state, fragments.gallery(view), job is not None and not job.ended]
    except UserError as error:
        return [fragments.failure(str(error)), "", False]
