"""The page in a real browser: one visitor's way from photos to files, with a run that outlives browser and page.

The tests stand in the order in which a person would do these things, and share a page and its runs.
"""

from __future__ import annotations

import os
import signal
import zipfile
from pathlib import Path

import psutil
import pytest
from page_browser import ROOT, Server, Visit, browser_path, opened_browser
from PIL import Image
from safetensors import safe_open

from gsoft_diffusion.app.runs import RunView
from gsoft_diffusion.app.workspace import read_json

PHOTOS = sorted((ROOT / "data" / "subjects" / "teddy_bear").glob("*.png"))
# What the browser says of requests and streams that break off, where the page is killed or loaded anew, or a visit
# ends; what the page itself refuses is in `missing`.
PAGE_IS_GONE = ("Failed to fetch", "Connection errored out", "network error", "signal is aborted")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if browser_path() is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail("there is no browser, and REQUIRE_BROWSER is set: apt-get install chromium")
        pytest.skip("tests of the page in a browser: no chromium on this machine")
    place = tmp_path_factory.mktemp("page")
    server = Server(place / "outputs", place / "log")
    server.start()
    yield server
    server.end()
    for path in server.folder.glob("app/jobs/*/process.json"):
        if psutil.pid_exists(pid := read_json(path)["pid"]):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser(server):
    with opened_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def visits(browser, server):
    """The visit that is under way; closing the browser ends it, and another begins."""
    under_way = [Visit(browser, server.address)]
    yield under_way
    for visit in under_way:
        assert visit.elsewhere == []
        assert visit.missing == []
        assert [line for line in visit.complaints if not any(said in line for said in PAGE_IS_GONE)] == []


@pytest.fixture
def visit(visits):
    return visits[-1]


def reopened(visits, browser, server, **options) -> Visit:
    visits[-1].close()
    visits.append(Visit(browser, server.address, **options))
    return visits[-1]


def drop(visit, *files) -> None:
    visit.page.set_input_files("#upload input[type=file]", [str(file) for file in files])


def cards(visit) -> list[str]:
    return visit.page.locator("#cards .card b").all_inner_texts()


# 1 Photos


def test_a_subject_is_made_and_its_photos_are_dropped(visit):
    visit.fill("subject-name", "My Ted")
    visit.fill("class-word", "bear")
    visit.page.click("#create-subject")
    visit.page.wait_for_selector("#upload input[type=file]", state="attached")
    visit.wait(lambda: "a sks bear" in visit.text("called"), "name in prompts")
    drop(visit, *PHOTOS)
    visit.page.wait_for_selector("#cards .card >> nth=4")
    assert cards(visit) == [path.name for path in PHOTOS]
    shown = "[...document.querySelectorAll('#cards img')].map(image => [image.complete, image.naturalWidth])"
    visit.wait(lambda: visit.page.evaluate(shown) == [[True, 64]] * 5, "thumbnails of 64 pixels")


def test_bad_files_are_refused_in_words_beside_the_field(visit, tmp_path):
    (tmp_path / "broken.png").write_bytes(PHOTOS[0].read_bytes()[:300])
    (tmp_path / "evil.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    Image.open(PHOTOS[0]).save(tmp_path / "<img src=x onerror=alert(1)>.png")
    drop(visit, tmp_path / "broken.png", tmp_path / "evil.svg", tmp_path / "<img src=x onerror=alert(1)>.png")
    visit.page.wait_for_selector("#cards .card >> nth=5")
    said = visit.text("upload-said")
    assert "broken.png: damaged or not a picture" in said
    assert "evil.svg: is no kind of picture known here" in said
    assert cards(visit)[-1] == "img-src-x-onerror-alert-1.png"
    assert "the same picture as 00.png" in visit.page.locator(
        "#cards .card"
    ).last.inner_text() or "nearly" in visit.text("cards")


def test_a_photo_is_captioned_and_removed_by_keyboard(visit):
    card = visit.page.locator("#cards .card").last
    card.focus()
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#remove-photo")
    visit.fill("caption", "a sks bear <b>on</b> leaves")
    visit.page.locator("#caption textarea, #caption input").first.press("Enter")
    visit.wait(lambda: "a sks bear <b>on</b> leaves" in visit.text("cards"), "caption, as it was written")
    visit.page.locator("#remove-photo").focus()
    visit.page.keyboard.press("Enter")
    visit.wait(lambda: len(cards(visit)) == 5, "five photos")


def test_a_photo_that_was_removed_is_put_back(visit):
    visit.page.locator("#cards .card").first.click()
    visit.page.wait_for_selector("#remove-photo")
    visit.page.click("#remove-photo")
    visit.wait(lambda: len(cards(visit)) == 4, "four photos")
    assert visit.text("put-back") == "Put 00.png back"
    visit.page.click("#put-back")
    visit.wait(lambda: cards(visit) == [path.name for path in PHOTOS], "all photos")


def held(visit, field) -> str:
    """What a field holds."""
    return visit.page.locator(f"#{field} input, #{field} textarea").first.input_value()


def test_what_was_typed_is_there_when_the_page_is_loaded_anew(visit):
    visit.page.locator("#cards .card").first.click()
    visit.page.wait_for_selector("#remove-photo")
    visit.wait(lambda: "a sks bear" in held(visit, "caption"), "caption of the photo")
    visit.fill("caption", "a bear that is not kept")
    visit.step("2 Base")
    visit.page.get_by_label("another").check()
    visit.fill("base-name", "some/model")
    visit.step("3 Train")
    visit.fill("field-max_train_steps", "77")
    visit.step("4 Draw")
    visit.fill("prompts", "a bear that is not drawn")
    visit.page.reload()
    visit.page.wait_for_selector("#cards .card >> nth=4")
    visit.page.locator("#cards .card").first.click()
    visit.wait(lambda: visit.page.locator("#caption").is_visible(), "field of the caption")
    visit.wait(lambda: held(visit, "caption") == "a bear that is not kept", "caption that was typed")
    visit.page.locator("#cards .card").nth(1).click()
    visit.wait(lambda: held(visit, "caption") == "a photo of a sks bear", "caption of the other photo")
    for step, field, typed in (
        ("2 Base", "base-name", "some/model"),
        ("3 Train", "field-max_train_steps", "77"),
        ("4 Draw", "prompts", "a bear that is not drawn"),
    ):
        visit.step(step)
        visit.page.locator(f"#{field}").wait_for()
        visit.wait(lambda field=field, typed=typed: held(visit, field) == typed, f"{typed} in {field}")
    visit.fill("prompts", "")
    visit.step("1 Photos")


def test_a_mask_is_painted(visit, server):
    visit.page.locator("#cards .card").first.click()
    visit.page.locator("#mask button").first.click()
    canvas = visit.page.locator("#mask-editor canvas").first
    canvas.wait_for()

    def painted() -> bool:
        """Whether a stroke in the middle became a mask; the editor takes none before its picture is in place."""
        box = canvas.bounding_box()
        across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        visit.page.mouse.move(across - 30, down)
        visit.page.mouse.down()
        visit.page.mouse.move(across + 30, down, steps=5)
        visit.page.mouse.up()
        visit.page.click("#save-mask")
        visit.page.wait_for_timeout(2000)
        return "with a mask" in visit.text("cards")

    visit.wait(painted, "mask")
    (path,) = server.folder.glob("app/subjects/my-ted/photos/*-masklabel.png")
    with Image.open(path) as mask:
        assert mask.size == (64, 64)
        assert mask.getextrema() == (0, 255)
    visit.page.click("#drop-mask")
    visit.wait(lambda: "with a mask" not in visit.text("cards"), "card without a mask")


def test_a_mask_made_elsewhere_is_dropped(visit, tmp_path):
    mask = Image.new("RGB", (64, 64))
    mask.save(tmp_path / "black.png")
    mask.paste("red", (0, 0, 32, 64))
    mask.save(tmp_path / "red.png")
    for name, said in (("black.png", "black everywhere"), ("red.png", "Kept")):
        visit.page.set_input_files("#mask-file input[type=file]", str(tmp_path / name))
        visit.wait(lambda known=Path(name).stem: known in visit.text("mask-file"), "name of the file")
        visit.page.click("#save-mask")
        visit.wait(lambda words=said: words in visit.text("edit-said"), said)
        visit.page.locator("#mask-file input[type=file]").wait_for(state="attached")  # it takes another
    visit.page.click("#drop-mask")
    visit.wait(lambda: "with a mask" not in visit.text("cards"), "card without a mask")


# 2 Base


def test_a_wrong_base_is_said_beside_the_field(visit):
    visit.step("2 Base")
    visit.page.get_by_label("another").check()
    visit.fill("base-name", "./no/such/folder")
    visit.page.click("#use-base")
    visit.wait(lambda: "there is no model folder ./no/such/folder" in visit.text("base-said"), "complaint")


def test_the_base_is_described_and_fits(visit):
    visit.page.get_by_label("the bundled miniature").check()
    visit.page.click("#use-base")
    visit.wait(lambda: "pictures of 64 pixels" in visit.text("base-about"), "description")
    assert "a GPU of 8 GB\tfits" in visit.text("base-about")
    assert visit.text("base-said") == ""
    visit.page.click("#fit")
    visit.wait(lambda: "nothing: it fits as it is" in visit.text("base-said"), "word of what was changed")


# 3 Train


def test_a_wrong_setting_is_said_beside_its_field(visit):
    visit.step("3 Train")
    visit.fill("field-max_train_steps", "0")
    visit.page.click("#start")
    visit.wait(lambda: "must be more than 0" in visit.text("field-max_train_steps"), "complaint beside the field")


def test_training_starts_and_another_run_waits_its_turn(visit):
    visit.fill("field-max_train_steps", "20")
    visit.fill("field-validation_steps", "10")
    visit.fill("field-validation_prompts", "a photo of a {0} {1}\na {0} {1} on the beach")
    if not visit.page.locator(
        "#field-num_inference_steps textarea, #field-num_inference_steps input"
    ).first.is_visible():
        visit.page.get_by_role("button", name="Advanced settings").click()
    visit.fill("field-num_validation_images", "1")
    visit.fill("field-num_inference_steps", "10")
    visit.page.click("#start")
    visit.wait(lambda: "my-ted: training, runs now" in visit.text("queue"), "run")
    assert "must be" not in visit.text("field-max_train_steps")
    visit.page.click("#start")
    visit.wait(lambda: "my-ted-2: training, waits for 1 before it" in visit.text("queue"), "second run in the queue")


def choose_run(visit, name) -> None:
    visit.page.locator("#run input").first.click()
    visit.page.get_by_role("option", name=name, exact=True).click()


def test_a_closed_browser_and_a_killed_page_lose_nothing(visits, browser, server):
    """Seen on a telephone's width the second time."""
    visit = reopened(visits, browser, server)
    visit.step("3 Train")
    assert "my-ted-2: training, waits" in visit.wait(lambda: visit.text("queue"), "queue")
    (pid,) = (read_json(path)["pid"] for path in server.folder.glob("app/jobs/0001/process.json"))
    server.end(signal.SIGKILL)
    assert psutil.pid_exists(pid)
    server.start()
    visit = reopened(visits, browser, server, viewport={"width": 390, "height": 800})
    visit.step("3 Train")
    choose_run(visit, "my-ted")
    visit.wait(lambda: "my-ted" in visit.text("headline"), "run")
    wide = visit.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    assert psutil.pid_exists(pid) or (server.folder / "my-ted" / "adapter.safetensors").is_file()


def test_sheets_appear_with_the_base_beside_and_the_run_ends(visits, browser, server):
    visit = reopened(visits, browser, server)
    visit.step("3 Train")
    choose_run(visit, "my-ted")
    visit.page.get_by_role("button", name="Its log").click()
    log = visit.page.locator("#log pre")
    heads = visit.page.locator("#sheets thead th")
    visit.wait(lambda: heads.count() >= 2, "sheet beside the base model's")
    assert log.is_visible()  # though it has got new lines since
    assert "base model" in heads.first.inner_text()
    assert "likeness" in heads.first.inner_text()
    visit.wait(lambda: "done, step 20 of 20" in visit.text("headline"), "end of the run")
    visit.wait(lambda: heads.count() == 3, "last sheet")
    assert visit.page.locator("#sheets tbody th").all_inner_texts() == [
        "a photo of a sks bear",
        "a sks bear on the beach",
    ]
    assert visit.page.locator("#curve svg").count() == 1


def test_a_page_that_is_loaded_anew_shows_what_was_chosen(visit):
    """Gradio does this by itself when the connection was lost. The other run is the later one."""
    visit.page.reload()
    visit.page.wait_for_selector("#subject")
    visit.step("3 Train")
    visit.wait(lambda: "my-ted done" in visit.text("headline"), "run that was chosen before")
    assert visit.page.locator("#run input").first.input_value() == "my-ted"


def test_a_run_is_stopped_and_goes_on(visit, server):
    """The second run, which the page started by itself when the first was done."""
    visit.fill("field-max_train_steps", "4000")
    choose_run(visit, "my-ted-2")
    visit.wait(lambda: RunView(server.folder / "my-ted-2").step >= 2, "step of the second run")
    visit.wait(lambda: visit.page.locator("#stop").is_enabled() or visit.page.locator("#go-on").is_enabled(), "buttons")
    if visit.page.locator("#stop").is_enabled():
        visit.page.click("#stop")
    visit.wait(lambda: visit.page.locator("#go-on").is_enabled(), "end of the second run")
    reached = RunView(server.folder / "my-ted-2").step
    visit.page.click("#go-on")  # with more steps than it will ever do here
    visit.wait(lambda: RunView(server.folder / "my-ted-2").step > reached, "further step")
    visit.wait(lambda: visit.page.locator("#draw-now").is_enabled(), "run that draws")
    visit.page.click("#draw-now")
    drawn = server.folder / "my-ted-2" / "validation"
    visit.wait(lambda: [p for p in drawn.glob("step-*.png") if int(p.stem[5:]) % 10], "sheet out of turn")
    visit.page.click("#stop")
    visit.wait(lambda: "stopped, step" in visit.text("headline"), "stop")
    last = RunView(server.folder / "my-ted-2")
    assert max(last.adapters) == last.step > reached


# 4 Draw


def test_drawing_side_by_side_with_the_base_beside(visit, server):
    visit.step("3 Train")
    choose_run(visit, "my-ted")
    visit.step("4 Draw")
    visit.wait(lambda: "my-ted, step 20" in visit.text("adapters"), "chosen adapter")
    visit.page.locator("#adapters input").first.click()
    visit.page.get_by_role("option", name="my-ted, step 10").click()
    visit.page.keyboard.press("Escape")
    visit.page.get_by_label("each by itself, side by side").check()
    visit.fill("prompts", "a {0} {1} in <i>space</i>")
    visit.fill("field-num_images", "1")
    visit.page.locator("#field-compare input").check()
    visit.page.click("#draw")
    figures = visit.page.locator("#pictures figure")
    visit.wait(lambda: figures.count() == 3, "three pictures")
    told = " ".join(figures.all_inner_texts())
    assert "a sks bear in <i>space</i>" in told
    assert "base model, seed 0" in told
    assert "my-ted/checkpoint-10" in told or "my-ted/checkpoint-20" in told


def test_a_picture_is_drawn_again_as_it_was(visit):
    visit.fill("prompts", "something else")
    visit.page.locator("#pictures figure button").first.click()
    field = visit.page.locator("#prompts textarea").first
    visit.wait(lambda: field.input_value() == "a sks bear in <i>space</i>", "prompt of the picture")


def test_a_prompt_is_needed(visit):
    visit.fill("prompts", "")
    visit.page.click("#draw")
    visit.wait(lambda: "write a prompt, such as" in visit.text("draw-said"), "complaint")


# 5 Take home


def test_each_format_is_made_and_downloaded(visit, server, tmp_path):
    visit.step("5 Take home")
    visit.wait(lambda: "adapter.safetensors" in visit.text("files"), "adapter")
    labels = ("LoRA for ComfyUI", "whole model in one file", "full differences", "whole model as a folder")
    for label in (*labels, "LoRA for diffusers"):
        before = len(list(server.folder.glob("app/jobs/*")))
        visit.page.get_by_label(label).check()
        visit.page.click("#make")  # the page takes no second click while it works on the first
        visit.wait(lambda known=before: len(list(server.folder.glob("app/jobs/*"))) > known, f"export of {label}")
    step = max(RunView(server.folder / "my-ted").adapters)
    stems = (f"{name}_step-{step}" for name in ("kohya_lora_rank64", "diffusers_lora_rank64", "merged", "diff"))
    wanted = {"adapter.safetensors", f"merged_step-{step}.zip", *(f"{stem}.safetensors" for stem in stems)}
    links = visit.page.locator("#files a")
    visit.wait(lambda: {text.rpartition("/")[2] for text in links.all_inner_texts()} == wanted, "all formats")
    for at in range(links.count()):
        with visit.page.expect_download() as download:
            links.nth(at).click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.name.startswith("my-ted-")
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
                assert f"merged_step-{step}/model_index.json" in archive.namelist()
        else:
            with safe_open(path, framework="pt") as file:
                assert len(list(file.keys())) > 10
    visit.page.get_by_role("button", name="The model card").click()
    visit.wait(lambda: "How it was made" in visit.text("card"), "model card")
    assert "ComfyUI/models/loras" in visit.text("files")


# What is not needed any more


def test_a_run_and_its_subject_are_deleted_after_a_question(visit, server):
    def is_asked(button: str) -> bool:
        return visit.page.locator(f"#{button}-question").is_visible()

    visit.step("3 Train")
    choose_run(visit, "my-ted")
    visit.wait(lambda: "my-ted done" in visit.text("headline"), "run")
    visit.wait(lambda: visit.page.locator("#delete-run").is_enabled(), "button")
    visit.page.click("#delete-run")
    visit.wait(lambda: is_asked("delete-run"), "question")
    assert "Delete the run my-ted with its adapters" in visit.text("delete-run-question")
    visit.page.click("#delete-run-no")
    visit.wait(lambda: not is_asked("delete-run"), "end of the question")
    assert (server.folder / "my-ted").is_dir()
    visit.page.click("#delete-run")
    visit.wait(lambda: is_asked("delete-run"), "question")
    visit.page.click("#delete-run-yes")
    visit.wait(lambda: visit.page.locator("#run input").first.input_value() == "my-ted-2", "other run")
    assert not (server.folder / "my-ted").exists()
    visit.step("1 Photos")
    visit.page.click("#delete-subject")
    visit.wait(lambda: "with its photos (5)" in visit.text("delete-subject-question"), "question")
    visit.page.click("#delete-subject-yes")
    visit.wait(lambda: "Give your subject a name to begin" in visit.text("called"), "page without a subject")
    assert visit.page.locator("#create-subject").is_visible()
    assert not list((server.folder / "app" / "subjects").iterdir())
