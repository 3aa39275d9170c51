"""What the buttons of step 4 do, called as Gradio calls them."""

from __future__ import annotations

import gradio as gr
import pytest
from page_folders import write_run
from PIL import Image

from gsoft_diffusion.app.fields import fields_of
from gsoft_diffusion.app.steps.draw import ELSEWHERE, MOST, Handlers
from gsoft_diffusion.config import GenerationConfig
from gsoft_diffusion.config.settings import Mark, marked, read_yaml
from gsoft_diffusion.sampling.pictures import save_png


@pytest.fixture
def does(page) -> Handlers:
    return Handlers(page, [each for each in fields_of(GenerationConfig, ELSEWHERE) if each.name == "seed"])


@pytest.fixture
def adapters(page) -> list[str]:
    """Those of two runs, the later run's first."""
    for run in ("dog", "cat"):
        for step in (4, 8):
            place = write_run(page.workspace.root / run) if step == 4 else page.workspace.root / run
            (place / f"checkpoint-{step}").mkdir()
            (place / f"checkpoint-{step}" / "adapter.safetensors").write_bytes(b"")
    return [name for _, name in page.adapters()]


def test_no_field_takes_a_path():
    assert set(marked(GenerationConfig, Mark.PATH)) <= set(ELSEWHERE)


def test_the_latest_adapter_of_the_run_is_chosen_and_a_choice_stays(does, adapters):
    assert does.followed("dog")["value"] == ["dog/checkpoint-8/adapter.safetensors"]
    assert does.followed("none")["value"] == []
    assert does.opened("dog", [adapters[0], "gone"])["value"] == [adapters[0]]
    assert does.opened("none", [])["value"] == [adapters[0]]


def test_what_is_asked_for_is_a_job_of_the_first_adapters_run(page, does, adapters, sleeping):
    said, *_ = does.asked(["dog/checkpoint-8/adapter.safetensors"], "together", "a\n\n b ", 0.5, 1, 1, 1, "7")
    assert said == ""
    job = page.jobs.current("dog", "draw")
    settings = read_yaml(job.folder / "settings.yaml")
    assert (settings["prompts"], settings["strength"], settings["seed"]) == (["a", "b"], [0.5], 7)
    assert settings["adapter"] == [str(page.workspace.root / "dog/checkpoint-8/adapter.safetensors")]


@pytest.mark.parametrize(
    ("chosen", "text", "says"),
    [
        ([], "a dog", "choose what was learned above"),
        (["dog/checkpoint-8/adapter.safetensors"], " \n", "write a prompt"),
        (["../x/adapter.safetensors"], "a dog", "is no adapter in this page"),
    ],
)
def test_what_is_missing_is_said(page, does, adapters, chosen, text, says):
    assert says in does.asked(chosen, "together", text, *[1] * MOST, "")[0]
    assert page.jobs.all() == []


def test_a_picture_is_drawn_again_with_what_is_still_there(page, does, adapters):
    made = [{"name": adapters[0], "strength": 0.5}, {"name": "gone/adapter.safetensors", "strength": 1}]
    place = page.workspace.root / "dog" / "images"
    facts = {"prompt": "a dog", "seed": 3, "adapters": made}
    save_png(Image.new("RGB", (8, 8)), place, "{}_seed3_x.png", 0, facts)
    event = gr.EventData(None, {"pick": "images/0000_seed3_x.png"})
    assert does.again([adapters[-1]], event) == [[adapters[0]], 0.5, 1, 1, 1, gr.skip(), "a dog", "3"]
    event = gr.EventData(None, {"pick": "images/none.png"})
    with pytest.raises(gr.Error, match="not there any more"):
        does.again([adapters[-1]], event)


def test_a_picture_of_several_adapters_is_drawn_again_with_all_of_them_together_and_its_guidance(page, adapters):
    fields = [each for each in fields_of(GenerationConfig, ELSEWHERE) if each.flag == "guidance_scale"]
    made = [{"name": name, "strength": 1} for name in adapters[:2]]
    facts = {"prompt": "a dog", "seed": 0, "adapters": made, "sampler": {"guidance_scale": 0.0}}
    save_png(Image.new("RGB", (8, 8)), page.workspace.root / "dog" / "images", "{}_seed0_x.png", 0, facts)
    event = gr.EventData(None, {"pick": "images/0000_seed0_x.png"})
    *_, mode, _, guidance = Handlers(page, fields).again([adapters[-1]], event)
    assert (mode, guidance) == ("together", "0.0")
