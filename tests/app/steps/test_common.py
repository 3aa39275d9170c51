"""What the steps share."""

from __future__ import annotations

import gradio as gr
import pytest

from gsoft_diffusion.app.steps.common import latest_of, updates
from gsoft_diffusion.foundation.errors import UserError


def test_only_what_is_not_as_it_is_shown_is_sent():
    first = updates([], ["a", "b", True])
    assert first == ["a", "b", gr.update(interactive=True), ["a", "b", True]]
    assert updates(first[-1], ["a", "c", False]) == [gr.skip(), "c", gr.update(interactive=False), ["a", "c", False]]
    assert updates(["a", True], ["a", True]) == [gr.skip(), gr.skip(), ["a", True]]


def test_the_latest_adapter_is_the_runs_own():
    adapters = [("dog-2, step 4", "dog-2/a"), ("dog, step 9", "dog/b"), ("dog, step 4", "dog/c")]
    assert [latest_of(adapters, run) for run in ("dog", "dog-2", "cat")] == ["dog/b", "dog-2/a", None]


@pytest.mark.parametrize(("name", "says"), [("", "first make a subject in step 1"), ("dog", "there is no subject dog")])
def test_a_subject_that_is_not_there_is_said(page, name, says):
    with pytest.raises(UserError, match=says):
        page.subject(name)
