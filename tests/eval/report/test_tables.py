"""The report's tables."""

from __future__ import annotations

import csv
import io

import numpy as np

from eval.report.lines import Line
from eval.report.tables import csv_rows, csv_text, markdown_table, sweep_rows, table_rows


def line(values, curve=False):
    """LoRA with one DINO score a subject, or several."""
    results = [{"cell": {"method": "lora", "subject": subject, "seed": 0}} for subject in values]
    if curve:
        for result in results:
            result["curve"] = [{"step": step, "dino": 0.1 * step, "clip_t": 0.5} for step in (1, 2)]
            result["scores"] = {"dino": 0.2, "clip_t": 0.5}
    scores = {name: {} for name in ("clip_i", "clip_t", "balance", "clip_i_base_prompt", "dino_nearest")}
    scores |= {
        "pres": {},
        "div": {},
        "drift": {},
        "dino": {subject: list(np.atleast_1d(value)) for subject, value in values.items()},
    }
    return Line("lora", "medium", 1e-3, results, scores)


def test_one_subject_or_one_seed_has_no_interval():
    (row,) = csv_rows([line({"rex": 0.25})])
    assert (row["dino_mean"], row["dino_low"], row["dino_high"]) == ("0.250000", "", "")
    assert table_rows([line({"rex": 0.25})])[0]["DINO ↑"] == "0.250 [–]"
    assert table_rows([line({"rex": [0.25, 0.35]})])[0]["DINO ↑"] == "0.300 [–]"
    assert table_rows([line({"rex": 0.25, "cup": 0.75})])[0]["DINO ↑"] == "0.500 [–]"
    (several,) = csv_rows([line({"rex": [0.2, 0.3], "cup": [0.7, 0.8]})])
    assert several["dino_mean"] == "0.500000"
    assert float(several["dino_low"]) < 0.5 < float(several["dino_high"])


def test_the_sweep_has_steps_where_curves_were_recorded():
    plain = sweep_rows({"lora": {1e-3: line({"rex": 0.25})}}, {"lora": 1e-3}, {})
    assert plain == [
        {"method": "LoRA", "learning rate": "0.001", "DINO ↑": "0.250", "CLIP-T ↑": "", "balance ↑": "", "chosen": "✓"}
    ]
    ends = {("rex", 0): ((0.0, 1.0), (1.0, 0.0))}
    rows = sweep_rows({"lora": {1e-3: line({"rex": 0.25}, curve=True)}}, {"lora": 1e-3}, ends)
    assert [(row["steps"], row["DINO ↑"], row["chosen"]) for row in rows] == [("1", "0.100", ""), ("2", "0.200", "✓")]


def test_rows_become_markdown_and_csv():
    rows = [{"a": "1", "b": "x, y"}, {"a": "", "b": "z"}]
    assert markdown_table(rows) == "| a | b |\n| --- | --- |\n| 1 | x, y |\n|  | z |"
    assert list(csv.DictReader(io.StringIO(csv_text(rows)))) == rows
    assert markdown_table([]) == ""
