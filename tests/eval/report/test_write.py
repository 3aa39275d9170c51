"""The report's files, made from the results and the sheets of a finished comparison."""

from __future__ import annotations

import csv
import shutil
import sys
from dataclasses import replace

import pytest
from tiny_eval import experiment

from eval.benchmark import run_benchmark
from eval.methods import METHODS
from eval.report.__main__ import main
from eval.report.introduction import MINIATURE
from eval.report.write import write_report
from eval.results import SETTINGS
from gsoft_diffusion import UserError


def test_comparison_ends_in_a_report(finished):
    rows = list(csv.DictReader((finished / "table.csv").open()))
    assert [row["method"] for row in rows] == ["photos", "base", *METHODS]
    assert all(-1 <= float(row["dino_mean"]) <= 1 for row in rows)
    assert not any(row["dino_low"] or row["dino_high"] for row in rows)  # of one seed
    assert all(float(row["balance_mean"]) >= 0 for row in rows[2:])
    sweep = list(csv.DictReader((finished / "learning_rates.csv").open()))
    assert [row["steps"] for row in sweep] == ["1", "2"] * (len(sweep) // 2)  # before the end too
    assert {row["steps"] for row in sweep if row["chosen"]} == {"2"}
    assert len({row["DINO ↑"] for row in sweep}) > 1
    text = (finished / "report.md").read_text()
    assert MINIATURE in text
    assert "rank" in text
    assert "Double GSOFT minus" in text
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 3  # Pareto plot, curves, and below them the learning rates
    assert page.index("<svg") < page.index("<h2>Learning rates</h2>") < page.rindex("<svg")
    assert all((finished / f"{plot}.svg").read_text().startswith("<?xml") for plot in ("pareto", "learning_rates"))


def test_results_and_sheets_suffice_for_the_same_report(finished, tmp_path, monkeypatch, capsys):
    """As in a fresh clone: neither the cells' folders are there, nor the photos, nor the base model."""
    out = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("work"))
    files = ("report.md", "report.html", "table.csv", "learning_rates.csv")
    files += ("pareto.svg", "learning_rates.svg", "curves.svg")
    before = {out / name: (out / name).read_bytes() for name in files}
    for path in before:
        path.unlink()
    world = finished.parent  # what the settings name is not there
    settings = (out / SETTINGS).read_text().replace(str(world), "/nowhere")
    (out / SETTINGS).write_text(settings)
    monkeypatch.setattr(sys, "argv", ["report", str(out)])
    assert main() == 0
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, before))


def test_a_report_can_be_written_from_any_folder(world, tmp_path, monkeypatch, in_process):
    """Paths that were given relative to one."""
    monkeypatch.chdir(world)
    places = {"subjects_dir": "subjects", "pretrained_model_name_or_path": "base", "prompts": "prompts.txt"}
    settings = experiment(world, subjects=["rex"], clip="mini_clip", dino="mini_dino", **places)
    run_benchmark(settings, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "out")])
    assert main() == 0
    monkeypatch.chdir(world)
    in_process.clear()
    run_benchmark(settings, tmp_path / "out")
    assert in_process == []


def test_a_sheet_that_is_gone_is_named(world, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "sheets" / "rex.webp").unlink()
    with pytest.raises(UserError, match=r"rex\.webp: is not there; run eval.benchmark again"):
        write_report(experiment(world, methods=list(METHODS), curve_every=1), out)
    run_benchmark(experiment(world, methods=list(METHODS), curve_every=1), out)  # the cells have the pictures
    assert (out / "sheets" / "rex.webp").read_bytes() == (finished / "sheets" / "rex.webp").read_bytes()


def test_one_subject_has_no_intervals_and_two_have(world, tmp_path, in_process):
    two = experiment(world, seeds=2, methods=["lora"])
    run_benchmark(two, tmp_path)
    assert "hierarchical bootstrap over subjects and seeds, paired" in (tmp_path / "report.md").read_text()
    photos, *others = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert not photos["dino_low"]  # the photos are scored once
    assert all(float(row["dino_low"]) <= float(row["dino_mean"]) <= float(row["dino_high"]) for row in others)
    write_report(replace(two, subjects=("rex",)), tmp_path)
    assert "no interval, since one subject or one seed" in (tmp_path / "report.md").read_text()
    assert not any(row["dino_low"] for row in csv.DictReader((tmp_path / "table.csv").open()))
