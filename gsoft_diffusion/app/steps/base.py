"""Step 2: the base model, what it is, and whether training it fits into memory."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.steps.common import LOUD, QUIET, Page
from gsoft_diffusion.app.subjects import Subject
from gsoft_diffusion.app.typed import Typed
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE

PRESETS = (8, 12, 16, 24)  # gigabytes of GPUs
RESERVED = 0.8e9  # bytes that CUDA and the display take of a GPU


@dataclass(frozen=True)
class BaseStep:
    """What the next step takes from this one."""

    fit: Any  # a button, whose press changes the settings of the next step
    memory: Any  # what it makes them fit into: "here" or a GPU's gigabytes
    said: Any  # where it is said what was changed
    kind: Any  # bundled or another
    name: Any  # the other's
    used: Any  # the event after which the subject has another base model, and perhaps another name


def build(page: Page, demo: gr.Blocks, subject: Any) -> BaseStep:
    """Lay out the step. page, demo: as in the photos' step. subject: the choice of a subject there."""
    gr.Markdown(
        "The model that learns your subject. Its choice decides how large pictures are, and by which rare word prompts "
        "call your subject."
    )
    kind = gr.Radio(
        [("the bundled miniature: 64 pixels, to try things out", "bundled"), ("another", "other")],
        value="bundled",
        label="Base model",
        elem_id="base-kind",
    )
    name = gr.Textbox(
        label="Which",
        info="a diffusers folder, a .safetensors file, or a name on the Hugging Face hub",
        placeholder="stable-diffusion-v1-5/stable-diffusion-v1-5",
        visible=False,
        elem_id="base-name",
    )
    use = gr.Button("Use this model", variant="primary", elem_id="use-base")
    said = gr.HTML(elem_id="base-said")
    about = gr.HTML(elem_id="base-about")
    with gr.Row(visible=False) as fitting:
        memory = gr.Radio(
            [("this machine", "here"), *((f"a GPU of {size} GB", str(size)) for size in PRESETS)],
            value="here",
            label="Fit it into",
            elem_id="memory",
        )
        fit = gr.Button("Set the switches that make it fit", elem_id="fit")

    nothing = ("", "", gr.update(visible=False))  # to be said of a model that is not used yet

    def opened(known: str) -> tuple[Any, ...]:
        subject = page.known(known)
        base = subject.base if subject else BUNDLED_BASE
        other = base != BUNDLED_BASE
        return "other" if other else "bundled", gr.update(value=base if other else "", visible=other), *nothing

    def chose(kind: str) -> tuple[Any, ...]:
        return gr.update(visible=kind == "other"), *nothing

    def settle(known: str, kind: str, name: str) -> tuple[Any, ...]:
        try:
            estimate = settled(page.subject(known), kind, name)
            try:
                text = _about(estimate)
            except Exception as error:  # whatever an architecture raises that cannot be counted without its weights
                raise UserError(f"how much memory it takes could not be estimated: {first_line(error)}") from error
        except UserError as error:
            return fragments.failure(str(error)), "", gr.update(visible=False)
        return "", text, gr.update(visible=True)

    of_model = [said, about, fitting]
    kind.input(chose, kind, [name, *of_model], **QUIET)
    typed = Typed("base", {"kind": kind, "name": name}, [subject])
    typed.show(demo.load)
    typed.wait(subject.change)
    typed.show(subject.change(opened, subject, [kind, name, *of_model], **QUIET).then)
    kind.change(lambda kind: gr.update(visible=kind == "other"), kind, name, **QUIET)
    used = gr.on([use.click, name.submit], settle, [subject, kind, name], of_model, **LOUD)
    return BaseStep(fit, memory, said, kind, name, used)


def settled(subject: Subject, kind: str, name: str) -> Any:
    """Keep the choice of a base model with what follows from it, the subject's token and the size of its pictures.

    subject: for which it was chosen. kind: `bundled` or another. name: the other's.

    Returns the estimate of what training it takes. Raises UserError if there is no such model, or it is of no known
    kind.
    """
    from gsoft_diffusion.models.rare_words import rare_word  # with PyTorch, which takes seconds
    from gsoft_diffusion.training.preflight import estimate_for

    base = BUNDLED_BASE if kind == "bundled" else name.strip()
    if not base:
        raise UserError("name a base model: a folder, a file, or a model on the hub")
    estimate = estimate_for(TrainingConfig(str(subject.photos), subject.class_word, pretrained_model_name_or_path=base))
    token = rare_word(estimate.model)
    subject.keep({"base": base, "resolution": estimate.model.resolution, "token": token})
    return estimate


def fitting_changes(config: TrainingConfig, memory: str) -> dict[str, Any]:
    """The fewest changes of settings with which training fits. Raises UserError if nothing is enough.

    config: the settings. memory: `here` for this machine, or a GPU's gigabytes.
    """
    import torch

    from gsoft_diffusion.foundation.memory import free_memory
    from gsoft_diffusion.training.preflight import estimate_for

    estimate = estimate_for(config, None if memory == "here" else torch.device("cuda"))
    available = free_memory(estimate.device) if memory == "here" else int(float(memory) * 1e9 - RESERVED)
    plan = estimate.plan(available)
    if plan is None:
        least = estimate.least()
        takes = least.needed if least else estimate.needed()
        raise UserError(
            f"no switch is enough: with all of them it takes at least {takes / 1e9:.1f} GB, and there are "
            f"{available / 1e9:.1f} GB; use a smaller --resolution or another base model"
        )
    return dict(plan.changes)


def _about(estimate: Any) -> str:
    """What the base model is, and what training it takes, in a table."""
    import torch

    from gsoft_diffusion.foundation.memory import free_memory
    from gsoft_diffusion.training.preflight import Estimate, flags

    model = estimate.model
    count = sum(p.numel() for part in model.parts() for p in getattr(getattr(model, part), "parameters", list)())
    free = free_memory(estimate.device)
    rows = [
        ("what it is", f"{model.title}, {count / 1e6:,.0f} million numbers, pictures of {model.resolution} pixels"),
        (
            "this machine",
            _fits(estimate.plan(free), estimate.needed(), flags)
            + f"; {free / 1e9:.1f} GB are free on {estimate.device}",
        ),
    ]
    gpu = Estimate(estimate.config, model, estimate.adapter, torch.device("cuda"))
    for size in PRESETS:
        rows.append((f"a GPU of {size} GB", _fits(gpu.plan(int(size * 1e9 - RESERVED)), gpu.needed(), flags)))
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    return f'<table class="take">{body}</table>'


def _fits(plan: Any, needed: int, flags: Any) -> str:
    if plan is None:
        return "too small, whatever is switched"
    if not plan.changes:
        return f"fits: training takes at least {needed / 1e9:.1f} GB"
    return f"fits with {flags(plan.changes)}: at least {plan.needed / 1e9:.1f} GB instead of {needed / 1e9:.1f}"
