"""The file of a comparison's results."""

from __future__ import annotations

import json

import pytest

from eval.cells import Cell
from eval.results import (
    all_results,
    as_columns,
    cell_folder,
    collect_results,
    is_done,
    pictures_folder,
    read_results,
    result_at,
    row_id,
)
from gsoft_diffusion import UserError

FIRST, SECOND = Cell("base", None, None, "rex", 0), Cell("lora", "medium", 1e-3, "rex", 0)


def write_cell(cell, out, **facts):
    cell_folder(cell, out).mkdir(parents=True)
    result = {"cell": vars(cell), **facts}
    (cell_folder(cell, out) / "result.json").write_text(json.dumps(result))
    return result


def test_no_comparison_has_no_results(tmp_path):
    assert read_results(tmp_path) == all_results(tmp_path) == collect_results(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_finished_cells_become_lines_in_order_with_every_number(tmp_path):
    facts = {"scores": {"dino": 0.1 + 0.2, "tiny": 1.2345678901234567e-300}, "prompt": "ein Bär\u2028im\nSchnee"}
    second, first = write_cell(SECOND, tmp_path, **facts), write_cell(FIRST, tmp_path)
    assert read_results(tmp_path) == {}
    assert collect_results(tmp_path) == {FIRST: first, SECOND: second}
    assert list(read_results(tmp_path).items()) == [(FIRST, first), (SECOND, second)]
    text = (tmp_path / "results.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 2
    assert "Bär" in text


def test_a_line_stays_when_its_cells_folder_goes(tmp_path):
    first = write_cell(FIRST, tmp_path)
    collect_results(tmp_path)
    cell_folder(FIRST, tmp_path).rename(tmp_path / "gone")
    second = write_cell(SECOND, tmp_path)
    assert is_done(FIRST, tmp_path)
    assert collect_results(tmp_path) == {FIRST: first, SECOND: second} == read_results(tmp_path)


def test_a_cell_without_a_result_is_not_done(tmp_path):
    cell_folder(FIRST, tmp_path).mkdir(parents=True)
    assert not is_done(FIRST, tmp_path)
    assert all_results(tmp_path) == {}


@pytest.mark.parametrize(
    "line",
    [
        *('{"cell": ', "[]", "7", "{}", '{"cell": 3}', '{"cell": {"method": "lora"}}', '{"cell": {"colour": "red"}}'),
        '{"cell": {"method": [], "budget": null, "learning_rate": null, "subject": "rex", "seed": 0}}',
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    write_cell(FIRST, tmp_path)
    collect_results(tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line 2: is not the result of a cell .*put back"):
        read_results(tmp_path)


# Steps before the end

CURVED = {
    "cell": vars(SECOND),
    "scores": {"dino": 0.5},
    "pictures": [{"file": "a.png", "dino": 0.4}, {"file": "b.png", "dino": 0.6}],
    "curve": [{"step": 20, "dino": 0.25, "pictures": {"dino": [0.2, 0.3]}}, {"step": 40, "dino": 0.5}],
}


def test_a_result_at_a_step_has_the_scores_of_that_step(tmp_path):
    before = result_at(CURVED, 20)
    assert before["scores"] == {"dino": 0.25}
    assert before["pictures"] == [{"file": "a.png", "dino": 0.2}, {"file": "b.png", "dino": 0.3}]
    assert (row_id(before), pictures_folder(before, tmp_path)) == (
        f"{SECOND.id}--step20",
        cell_folder(SECOND, tmp_path) / "step20",
    )
    end = result_at(CURVED, 40)
    assert end == CURVED
    assert (row_id(end), pictures_folder(end, tmp_path)) == (SECOND.id, cell_folder(SECOND, tmp_path))


def test_a_result_at_a_step_says_nothing_of_the_whole_training():
    whole = CURVED | {"train_seconds": 10.0, "orthogonality_error": 1e-6}
    before = result_at(whole, 20)
    assert before["train_seconds"] == 5.0
    assert "orthogonality_error" not in before
    assert result_at(whole, 40) == whole


def test_results_of_before_have_no_pictures_at_their_steps():
    (first, *_), end = [{"step": 20, "dino": 0.25}], CURVED["curve"][1]
    assert "pictures" not in result_at(CURVED | {"curve": [first, end]}, 20)


def test_columns_keep_scores_and_nothing_else():
    rows = [
        {"file": "a.png", "seed": 1, "dino": 0.123456789, "clip_t": 0.5},
        {"file": "b.png", "dino": 1.0, "clip_t": 0},
    ]
    assert as_columns(rows) == {"dino": [0.123457, 1.0], "clip_t": [0.5, 0]}
