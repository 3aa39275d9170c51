"""How engines are measured, with an engine that takes no time."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_eval import experiment, write_world

from benchmarks import engines
from eval.engines import ENGINES
from eval.results import is_done


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Measurements of two engines; returns what the engines were given."""
    world = write_world(tmp_path / "world")
    monkeypatch.setattr(engines, "EXPERIMENT", experiment(world, subjects=["rex"]).to_dict())
    seen = []

    def engine(settings, cells, out, workers):
        seen.append((workers.number, len(cells), [is_done(cell, out) for cell in cells]))

    for name in ("local", "ray"):
        monkeypatch.setitem(ENGINES, name, engine)
    arguments = ["--out", str(tmp_path / "engines.json"), "--engines", "local", "ray", "--cells", "3", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["engines", *arguments])
    return seen


def test_engines_take_turns_and_cells_are_real_or_have_nothing_to_do(calls, tmp_path, capsys):
    assert engines.main() == 0
    nothing_to_do, real = [True] * 3, [False] * 3
    assert calls == [(1, 3, nothing_to_do)] * 2 + [(1, 3, real)] * 2 + [(2, 3, real)] * 2
    records = json.loads((tmp_path / "engines.json").read_text())["records"]
    assert [record["engine"] for record in records] == ["local", "ray"] * 3
    assert engines.main() == 0
    assert len(calls) == 6  # what is measured is not measured again
    assert "| local |" in capsys.readouterr().out


def test_tables_say_cells_an_hour_and_shares_of_the_first_engine(tmp_path, capsys):
    records = engines.Records(tmp_path / "engines.json", {})
    for engine, factor in (("local", 1), ("ray", 2)):
        records.add(round=0, kind="overhead", workers=1, engine=engine, cells=2, seconds=3.0 * factor)
        records.add(round=0, kind="cells", workers=1, engine=engine, cells=2, seconds=20.0 * factor)
        records.add(round=0, kind="cells", workers=2, engine=engine, cells=2, seconds=10.0 * factor)
    lines = engines.tables(records).splitlines()
    assert "| local | 1.5 |" in lines
    assert "| ray | 3.0 |" in lines
    assert "| local | 360 (1.00) | 720 (1.00) |" in lines
    assert "| ray | 180 (0.50) | 360 (0.50) |" in lines
