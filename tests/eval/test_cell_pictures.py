"""Which pictures cells draw, and from which noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_eval import grid

from eval import cell_pictures
from eval.cell_pictures import draw, untouched_pictures
from eval.cells import Cell
from eval.experiment import Experiment
from eval.prompts import Prompt, prompts_for
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import load_model


def prepared(experiment: Experiment, cell: Cell) -> tuple[list[Prompt], BaseModel]:
    """The prompts of a cell's subject, and the base model."""
    subject = next(subject for subject in experiment.chosen_subjects() if subject.name == cell.subject)
    prompts = prompts_for(subject, experiment.unique_token, experiment.prompts, experiment.max_prompts)
    return prompts, load_model(experiment.pretrained_model_name_or_path)


def test_methods_start_a_picture_from_the_base_model_s_noise(world, finished_grid, monkeypatch):
    asked = {}

    def generate(models, jobs, *arguments, **options):
        asked[which.method] = [seed for _, seed in jobs]
        raise InterruptedError

    monkeypatch.setattr(cell_pictures, "generate", generate)
    for method in ("base", "lora"):
        which = Cell(method, *((None, None) if method == "base" else ("medium", 1e-3)), "rex", 1)
        prompts, models = prepared(grid(world), which)
        asked_for = [replace(p, text=p.plain) for p in prompts] if method == "base" else prompts
        with pytest.raises(InterruptedError):
            draw(grid(world), models, asked_for, which)
    assert asked["base"] == asked["lora"]
    assert len(set(asked["base"])) > len(asked["base"]) / 2


def test_the_base_model_s_pictures_for_drift_are_those_of_its_own_cell(world, finished_grid, monkeypatch, tmp_path):
    which = Cell("lora", "medium", 1e-3, "rex", 1)
    prompts, models = prepared(grid(world), which)
    drawn = untouched_pictures(grid(world), which, tmp_path, prompts, models)
    monkeypatch.setattr(cell_pictures, "draw", None)
    kept = untouched_pictures(grid(world), which, finished_grid, prompts, models)
    assert len(kept) == len(drawn) == 4
    for one, other in zip(kept, drawn, strict=True):  # in a batch of another size, which rounds in another way
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other)).max() <= 1
