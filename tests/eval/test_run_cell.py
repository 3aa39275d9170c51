"""One cell on a GPU, a pretended one."""

from __future__ import annotations

import json

import pytest
from pretended import pretended_gpu
from tiny_eval import grid

from eval import run_cell
from eval.cells import Cell
from eval.results import CELL_RESULT, cell_folder


def test_a_cell_on_a_gpu_has_the_cpu_s_scores_and_never_holds_the_base_twice(
    world, finished_grid, monkeypatch, tmp_path
):
    loaded, held = [], []
    load, train = run_cell.load_model, run_cell.train

    def watched_load(*arguments, **options):
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    def watched_train(*arguments):
        (models,) = loaded
        networks = (models.denoiser, models.vae, *models.all_text_encoders())
        held.append({parameter.device.type for network in networks for parameter in network.parameters()})
        return train(*arguments)

    monkeypatch.setattr(run_cell, "load_model", watched_load)
    monkeypatch.setattr(run_cell, "train", watched_train)
    cell = Cell("double_gsoft", "medium", 1e-3, "rex", 0)
    with pretended_gpu():
        run_cell.run_cell(grid(world), cell, tmp_path)
    assert held == [{"cpu"}]
    assert loaded[0].device.type == "cuda"  # where it drew
    scores, wanted = (
        json.loads((cell_folder(cell, out) / CELL_RESULT).read_text())["scores"] for out in (tmp_path, finished_grid)
    )
    assert scores == pytest.approx(wanted, abs=1e-3)
