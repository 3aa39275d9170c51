"""The page with the pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import pytest
from PIL import Image
from tiny_eval import experiment

from eval.methods import METHODS
from eval.report.page import LARGEST
from eval.report.write import write_report
from eval.subject_sheets import DESCRIPTION, read_subject_sheet, sheet_path


@pytest.fixture
def settings(world):
    return experiment(world, methods=list(METHODS), curve_every=1)


def test_the_page_needs_no_other_file(finished):
    page = (finished / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # nothing is fetched
    assert page.count("<details") == 2
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall('base64,([^"]+)"', page)]
    assert len(pictures) == 2 * 3 * (1 + len(METHODS))  # subjects, prompts, and the base model beside the methods
    assert all(max(picture.size) <= LARGEST for picture in pictures)
    assert "a red dog" in page
    assert "sks" not in page.partition("<h2>Pictures</h2>")[2]


def test_pictures_that_were_not_kept_are_said_to_be(settings, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    path = sheet_path("rex", out)
    image = Image.open(path)
    exif = image.getexif()
    places = json.loads(exif[DESCRIPTION])
    places["rows"] = {name: row for name, row in places["rows"].items() if not name.startswith("boft")}
    exif[DESCRIPTION] = json.dumps(places)
    image.save(path, exif=exif)
    assert len(read_subject_sheet(path).rows) == len(METHODS)
    write_report(settings, out)
    assert (out / "report.html").read_text().count("<td>not kept</td>") == 3
    assert "not kept" not in (finished / "report.html").read_text()


def test_a_diverged_training_has_no_pictures(settings, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for result in results:
        if result["cell"]["method"] == "oft" and result["cell"]["subject"] == "rex":
            del result["scores"], result["pictures"], result["curve"]
            result["diverged"] = "the loss is not finite"
    (out / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    write_report(settings, out)
    assert (out / "report.html").read_text().count("<td>diverged</td>") == 3
    assert "Training diverged, so there is no score: OFT v2 medium." in (out / "report.md").read_text()
