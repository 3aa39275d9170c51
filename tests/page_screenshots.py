"""The screenshots of docs/app.md: a run of the bundled car, and every step of the page with it.

make screenshots           # into docs/images/app, in light; about ten minutes on two cores
python tests/page_screenshots.py --out elsewhere --dark --width 390
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from page_browser import ROOT, Server, Visit, opened_browser
from PIL import Image

PHOTOS = sorted((ROOT / "data" / "subjects" / "blue_car").glob("*.png"))
COLOURS = 128  # of a picture in the repository


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "app", help="folder for the pictures")
    parser.add_argument("--folder", type=Path, help="the page's folder, with what an earlier call has left in it")
    parser.add_argument("--dark", action="store_true", help="the dark colours")
    parser.add_argument("--width", type=int, default=1100, help="of the window, in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of the run (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, opened_browser() as browser:
        server = Server(args.folder or Path(place) / "outputs", Path(place) / "log")
        server.start()
        try:
            scheme = "dark" if args.dark else "light"
            visit = Visit(browser, server.address, viewport={"width": args.width, "height": 900}, color_scheme=scheme)
            shoot(visit, args.out, args.steps, new=not (server.folder / "app" / "subjects" / "my-car").exists())
        finally:
            server.end()


def shoot(visit: Visit, out: Path, steps: int, new: bool) -> None:
    """Go through the page's steps and take a picture of each. new: nothing has been done in the folder yet."""
    page = visit.page
    if new:
        visit.fill("subject-name", "My car")
        visit.fill("class-word", "car")
        page.click("#create-subject")
        page.wait_for_selector("#upload input[type=file]", state="attached")
        visit.wait(lambda: "a sks car" in visit.text("called"), "name in prompts")
        page.set_input_files("#upload input[type=file]", [str(path) for path in PHOTOS])
    page.wait_for_selector("#cards .card >> nth=4")
    page.locator("#cards .card").nth(2).click()
    page.wait_for_selector("#remove-photo")
    take(visit, out / "photos.png")
    visit.step("2 Base")
    page.click("#use-base")
    page.wait_for_selector("#base-about table")
    take(visit, out / "base.png")
    visit.step("3 Train")
    if new:
        visit.fill("field-max_train_steps", str(steps))
        visit.fill("field-validation_steps", str(steps // 3))
        visit.fill("field-validation_prompts", "a photo of a {0} {1}\na {0} {1} on the beach\na {0} {1} in the snow")
        page.get_by_role("button", name="Advanced settings").click()
        visit.fill("field-num_validation_images", "1")
        page.get_by_role("button", name="Advanced settings").click()
        page.click("#start")
    wait_long(visit, lambda: page.locator("#sheets thead th").count() >= 3)
    take(visit, out / "train.png")
    wait_long(visit, lambda: "done" in visit.text("headline"))
    visit.step("4 Draw")
    visit.wait(lambda: "my-car" in visit.text("adapters"), "chosen adapter")
    visit.fill("prompts", "a {0} {1} on the beach\na {0} {1} in space")
    visit.fill("field-num_images", "2")
    page.locator("#field-compare input").check()
    page.wait_for_timeout(5000)
    if page.locator("#pictures figure").count() < 8:
        page.click("#draw")
    wait_long(visit, lambda: page.locator("#pictures figure").count() >= 8 and visit.text("queue") == "")
    take(visit, out / "draw.png")
    visit.step("5 Take home")
    page.wait_for_timeout(5000)
    if page.locator("#files a").count() < 2:
        page.click("#make")
    wait_long(visit, lambda: page.locator("#files a").count() >= 2)
    page.get_by_role("button", name="The model card").click()
    take(visit, out / "take_home.png")


def wait_long(visit: Visit, there: Callable[[], bool]) -> None:
    """Wait for what takes as long as a run."""
    while not there():
        visit.page.wait_for_timeout(2000)


def take(visit: Visit, path: Path) -> None:
    """A picture of the whole page, in few colours, so that it is small."""
    visit.page.wait_for_timeout(2500)
    visit.page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
