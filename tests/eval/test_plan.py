"""What a comparison would take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_eval import experiment, grid

from eval.cells import main_cells, sweep_cells
from eval.methods import METHODS
from eval.plan import plan
from gsoft_diffusion import UserError


def test_plan_lists_cells_time_and_disk(world, tmp_path):
    text = plan(experiment(world, seeds=3), tmp_path / "none", workers=2)
    assert "2 subjects: cup (cup), rex (dog)" in text
    assert "base model and photos: 6 cells, 0 done" in text
    assert "learning rates: 2 cells" in text
    assert "comparison: 12 cells, 1 of them counted above" in text
    assert "GB of pictures" in text
    assert not (tmp_path / "none").exists()


def test_plan_counts_a_cell_of_the_sweep_and_the_comparison_once(world, tmp_path):
    settings = experiment(world, seeds=3, seconds_per_step=600, seconds_per_picture=0)
    rates = {method: getattr(settings.learning_rates, method)[0] for method in settings.methods}
    distinct = {*sweep_cells(settings), *main_cells(settings, rates)}
    hours = len(distinct) * settings.max_train_steps * 600 / 3600
    assert f"in all {hours:.1f} hours with 1 workers" in plan(settings, tmp_path, workers=1)


def test_plan_of_a_grid(world, tmp_path):
    settings = grid(world, budgets=["small", "medium"], seconds_per_step=10, seconds_per_picture=1)
    text = plan(settings, tmp_path, workers=2)
    assert "grid: 24 cells, 0 done" in text  # two subjects, seeds and sizes, three rates
    assert "learning rates:" not in text
    assert "double_gsoft--small--lr0.01--cup--seed0" in text
    pictures = 2 * 9  # nine after each of two steps
    minutes = (24 * (2 * 10 + pictures) + 4 * 9) / 2 / 60
    assert f"in all {minutes:.0f} minutes with 2 workers (guessed" in text
    assert "MB of results.jsonl" in text


def test_plan_is_made_without_the_base_model(world, tmp_path):
    text = plan(experiment(world, pretrained_model_name_or_path="./nowhere", resolution=512), tmp_path, workers=1)
    assert "sizes are listed where the base model is: there is no model folder ./nowhere" in text
    assert "pictures of 512 px" in text


def test_a_plan_is_refused_where_the_run_would_be(world, finished, tmp_path):
    comparison = experiment(world, methods=list(METHODS), curve_every=1)
    assert "base model and photos: 2 cells, 2 done" in plan(comparison, finished, workers=1)
    with pytest.raises(UserError, match="max_train_steps is 3 and was 2"):
        plan(replace(comparison, max_train_steps=3), finished, workers=1)
    with pytest.raises(UserError, match="grid: chooses each subject's setting on the others"):
        plan(grid(world, subjects=["rex"]), tmp_path, workers=1)
