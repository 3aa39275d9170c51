"""What was typed: held by the browser alone. `test_page.py` tries it in one."""

from __future__ import annotations

import gradio as gr

from gsoft_diffusion.app.typed import Typed


def test_what_is_typed_is_held_for_its_owner_and_the_server_is_not_told():
    with gr.Blocks() as demo:
        owner, field = gr.Textbox(), gr.Textbox()
        typed = Typed("settings", {"max_train_steps": field}, [owner])
        typed.wait(owner.change)
        typed.show(demo.load)
        typed.forget(owner.submit)
    events = list(demo.fns.values())
    assert [event.fn for event in events] == [None] * 4
    assert [event.inputs for event in events] == [[owner, field]] * 4
    assert [[field] if event.outputs else [] for event in events] == [[], [], [field], []]
    for event, act in zip(events, ("hold", "wait", "show", "forget"), strict=True):
        assert f'{{"act": "{act}", "part": "settings", "names": ["max_train_steps"], "owners": 1}}' in str(event.js)
