"""The report of a grid."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from tiny_eval import grid

from eval.benchmark import run_benchmark
from eval.report.write import write_report
from eval.results import read_results
from eval.subject_sheets import read_subject_sheet, sheet_path

FILES = ("report.md", "table.csv", "fronts.csv", "settings.csv", "fronts.svg", "report.html")


def test_it_opens_with_pictures_and_fronts(finished_grid):
    page = (finished_grid / "report.html").read_text()
    places = [
        page.index(f"<h2>{title}") for title in ("Pictures", "Fronts", "Verdict", "Lead and area", "All settings")
    ]
    assert places == sorted(places)
    assert places[1] < page.index("<svg") < places[2]
    assert page.count("<svg") == 1
    assert 'src="data:image/webp' in page[places[0] : places[1]]
    assert "not kept" not in page


def test_its_tables_hold_every_setting_and_every_measure(finished_grid):
    settings = list(csv.DictReader((finished_grid / "settings.csv").open()))
    assert [(row["method"], row["learning rate"], row["steps"]) for row in settings] == [
        *(("Double GSOFT", rate, step) for rate in ("0.001", "0.01") for step in "12"),
        *(("LoRA", "0.001", step) for step in "12"),
    ]
    measures = list(csv.DictReader((finished_grid / "fronts.csv").open()))
    assert [row["measure"] for row in measures] == ["area", *["clip_t"] * 3, *["dino"] * 3, "lead"] * 2
    assert all(row["value"] for row in measures if row["measure"] == "area")
    text = (finished_grid / "report.md").read_text()
    assert "each scored after 1, 2 steps" in text
    assert "so none of its own scores chose the setting" in text
    assert "There is no verdict" in text.partition("## Verdict")[2]


def test_results_and_sheets_suffice_for_it(world, finished_grid, tmp_path, in_process):
    out = shutil.copytree(finished_grid, tmp_path / "out", ignore=shutil.ignore_patterns("work"))
    before = {name: (out / name).read_bytes() for name in FILES}
    for name in FILES:
        (out / name).unlink()
    run_benchmark(grid(world), out)
    assert in_process == []
    assert {name: (out / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("step", [1, 2])
def test_sheets_have_the_step_that_was_chosen(world, finished_grid, tmp_path, in_process, step):
    """Whichever it is: what that step drew, not what the end of the training drew."""
    out = tmp_path / "out"
    shutil.copytree(finished_grid / "work", out / "work")
    results = list(read_results(finished_grid).values())
    for result in results:
        if result["cell"]["method"] == "base":
            result["scores"] |= {"dino": 0.0, "clip_t": 1.0}
            result["photos"] |= {"dino": 1.0, "clip_t": 0.0}
        else:
            first, last = result["curve"]
            first |= dict.fromkeys(("dino", "clip_t"), 0.9 if step == 1 else 0.1)
            last |= dict.fromkeys(("dino", "clip_t"), 0.5)
            result["scores"] |= dict.fromkeys(("dino", "clip_t"), 0.5)
    (out / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    run_benchmark(grid(world), out)
    assert in_process == []
    sheet = read_subject_sheet(sheet_path("rex", out))
    after = "--step1" if step == 1 else ""
    assert list(sheet.rows)[1:] == [
        f"{name}--lr0.001--rex--seed0{after}" for name in ("double_gsoft--medium", "lora--medium")
    ]
    assert all(row.pictures.keys() == sheet.columns.keys() for row in sheet.rows.values())
    label = sheet.rows[f"lora--medium--lr0.001--rex--seed0{after}"].label
    assert label == "LoRA medium, 0.001" + (", step 1" if step == 1 else "")


def test_without_sheets_no_picture_leaves_the_working_folder(world, finished_grid, tmp_path, in_process):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished_grid / "results.jsonl", out)
    run_benchmark(grid(world, sheets=False), out)
    assert in_process == []
    assert {path.name for path in out.iterdir()} == {*FILES, "results.jsonl", "experiment.yaml"}
    page = (out / "report.html").read_text()
    assert "<img" not in page
    assert "Pictures</h2>" not in page


def test_a_single_seed_has_no_intervals(world, finished_grid, tmp_path):
    out = shutil.copytree(finished_grid, tmp_path / "out")
    write_report(grid(world, seeds=1), out)
    text = (out / "report.md").read_text()
    assert "no interval, since one subject or one seed" in text
    assert (
        text.count("There is no verdict, since no lead has an interval: that needs two or more subjects and seeds") == 1
    )
    for name in ("table.csv", "fronts.csv"):
        rows = list(csv.DictReader((out / name).open()))
        assert not any(value for row in rows for key, value in row.items() if key.endswith(("_low", "_high")))
    of_two_seeds = list(csv.DictReader((finished_grid / "table.csv").open()))
    with_interval = [row["method"] for row in of_two_seeds if row["dino_low"]]
    assert with_interval == ["base"]  # photos are scored once, and two subjects are too few to choose anew
