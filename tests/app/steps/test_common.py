"""What the steps share."""

from __future__ import annotations

import gradio as gr
import pytest

from gsoft_diffusion.app.steps.common import latest_of, says_why, updates
from gsoft_diffusion.foundation.errors import UserError


def test_only_what_is_not_as_it_is_shown_is_sent():
    first = updates([], ["a", "b", True])
    assert first == ["a", "b", gr.update(interactive=True), ["a", "b", True]]
    assert updates(first[-1], ["a", "c", False]) == [gr.skip(), "c", gr.update(interactive=False), ["a", "c", False]]
    assert updates(["a", True], ["a", True]) == [gr.skip(), gr.skip(), ["a", True]]


def test_runs_that_came_to_nothing_are_gone_once_another_was_asked_for(page, sleeping):
    """One that failed before it wrote anything is shown until then, so that its error is seen."""
    page.jobs.add("train", "failed", {})
    failed = page.jobs.current("failed", "train")
    page.jobs.add("train", "withdrawn", {})
    page.jobs.stop(page.jobs.current("withdrawn", "train"))
    assert page.runs() == ["failed"]  # it runs
    (failed.folder / "end.json").write_text('{"status": 2}')
    assert page.runs() == []  # the withdrawn one was asked for after it
    page.jobs.add("train", "next", {})
    assert page.runs() == ["next"]
    (page.jobs.current("next", "train").folder / "end.json").write_text('{"status": 2}')
    assert page.runs() == ["next"]


def test_the_latest_adapter_is_the_runs_own():
    adapters = [("dog-2, step 4", "dog-2/a"), ("dog, step 9", "dog/b"), ("dog, step 4", "dog/c")]
    assert [latest_of(adapters, run) for run in ("dog", "dog-2", "cat")] == ["dog/b", "dog-2/a", None]


@pytest.mark.parametrize(("name", "says"), [("", "first make a subject in step 1"), ("dog", "there is no subject dog")])
def test_a_subject_that_is_not_there_is_said(page, name, says):
    with pytest.raises(UserError, match=says):
        page.subject(name)


def test_a_message_is_shown_as_it_was_written():
    """Gradio shows a message as HTML."""

    @says_why
    def refuses():
        raise UserError("dog has no photo <b>.png")

    with pytest.raises(gr.Error, match=r"dog has no photo &lt;b&gt;\.png"):
        refuses()
