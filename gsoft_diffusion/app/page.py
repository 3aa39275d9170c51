"""The page: five steps, and above them what runs and what waits."""

from __future__ import annotations

import gradio as gr

from gsoft_diffusion.app.steps import base, draw, photos, take_home, train
from gsoft_diffusion.app.steps.common import QUIET, Page, remembered

TITLE = "gsoft-diffusion"
THEME = gr.themes.Soft(
    primary_hue="teal",
    font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],  # the machine's own, so that none is fetched
    font_mono=["ui-monospace", "Menlo", "monospace"],
).set(
    # Dark enough to be read by everybody: a contrast of 4.5 with what is behind it.
    color_accent="*primary_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_cancel_text_color="#b42318",
    button_cancel_text_color_hover="#b42318",
    button_cancel_text_color_dark="#fda29b",
    button_cancel_text_color_hover_dark="#fda29b",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    block_title_text_color="*primary_800",
    block_label_text_color="*primary_800",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
)
HOUR = 3600  # seconds


def build(page: Page) -> gr.Blocks:
    """The page, ready to be served. page: what it works on."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(HOUR, HOUR)) as demo:
        gr.Markdown("# Your subject in any picture\nDrop photos of it, watch it being learned, draw it, take it home.")
        queue = gr.HTML(elem_id="queue")
        subject, run = remembered("subject"), remembered("run")
        with gr.Tabs(elem_id="steps", overflow_behavior="wrap") as steps:
            with gr.Tab("1 Photos", id="photos"):
                of_photos = photos.build(page, demo, subject)
                _next(steps, "base", "Next: the base model")
            with gr.Tab("2 Base", id="base"):
                of_base = base.build(page, demo, of_photos.subject)
                _next(steps, "train", "Next: training")
            with gr.Tab("3 Train", id="train") as tab:
                of_training = train.build(page, demo, tab, of_photos.subject, of_base, queue, run)
                for renamed in of_photos.follow([of_base.used, of_training.started], of_training.prompts):
                    of_training.typed.hold(renamed.then)
                _next(steps, "draw", "Next: drawing")
            with gr.Tab("4 Draw", id="draw") as tab:
                draw.build(page, demo, tab, of_training.run)
                _next(steps, "take-home", "Next: taking it home")
            with gr.Tab("5 Take home", id="take-home") as tab:
                take_home.build(page, demo, tab, of_training.run)
    return demo


def _next(steps: gr.Tabs, step: str, words: str) -> None:
    """A button that opens another step."""
    gr.Button(words, elem_classes=["next"]).click(lambda: gr.Tabs(selected=step), None, steps, **QUIET)
