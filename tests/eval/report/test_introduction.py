"""What a report says before its tables."""

from __future__ import annotations

from tiny_eval import experiment

from eval.report.introduction import MIXED, introduction
from eval.results import read_results


def said(finished, changes, **settings):
    """The introduction of finished cells, of which the first ones are changed."""
    results = [result for cell, result in read_results(finished).items() if cell.method != "base"]
    results = [result | (changes if number < 2 else {}) for number, result in enumerate(results)]
    return introduction(settings["experiment"], [], results, results[0]["encoders"]), len(results)


def test_every_machine_and_version_is_named(world, finished):
    alone, _ = said(finished, {}, experiment=experiment(world))
    assert " a cell; python " in alone
    assert "cells: " not in alone
    assert MIXED not in alone
    assert "2 threads a cell" in said(finished, {"threads": 2}, experiment=experiment(world))[0]
    assert "1 thread a cell" in said(finished, {"threads": 1}, experiment=experiment(world))[0]
    versions = {"python": "3.99", "torch": "9.9"}
    mixed, count = said(finished, {"device": "H200", "versions": versions}, experiment=experiment(world))
    assert f"\n\n{count - 2} cells: " in mixed
    assert "\n\n2 cells: H200, " in mixed
    assert "python 3.99, torch 9.9." in mixed
    assert f"**{MIXED}**" in mixed


def test_how_rates_were_chosen_is_said(world, finished):
    swept = experiment(world, sweep_subjects=2)
    text, _ = said(finished, {}, experiment=swept)
    names = ", ".join(swept.subject_names())
    assert f"is the best of 1 or 2, by the balance at the size medium on {names} with seed 0, for all sizes" in text
    assert "These cells are part of the averages as well" in text
    text, _ = said(finished, {}, experiment=experiment(world, methods=["lora"]))
    assert "learning rates as given." in text
