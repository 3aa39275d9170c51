"""The committed comparison: its report is what the program writes, and docs/language.md shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from examples.language.compare import RATES
from examples.language.methods import METHODS
from examples.language.report import write_report
from examples.language.tasks import FETCHED

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results" / "language"
PAGE = (ROOT / "docs" / "language.md").read_text()


def test_the_report_is_of_the_results(tmp_path):
    shutil.copy(RESULTS / "results.json", tmp_path)
    write_report(tmp_path)
    assert (tmp_path / "table.md").read_text() == (RESULTS / "table.md").read_text()


def test_the_page_has_the_tables():
    rows = [line for line in (RESULTS / "table.md").read_text().splitlines() if line.startswith("|")]
    assert [row for row in rows if row not in PAGE] == []


def test_every_cell_was_run():
    content = json.loads((RESULTS / "results.json").read_text())
    trained = [record for record in content["records"] if record["kind"] == "training"]
    for method in METHODS:
        assert {one["learning_rate"] for one in trained if one["method"] == method} == set(RATES[method])
        for task in FETCHED:
            seeds = [one["seed"] for one in trained if (one["method"], one["task"]) == (method, task)]
            assert {0, 1, 2} == set(seeds)
