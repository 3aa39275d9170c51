"""The curve of a run's scores."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import pictures_of
from gsoft_diffusion.training.curve import write_curve


@pytest.fixture
def run(tmp_path) -> Path:
    """Scores of the base model and of three steps, of which one is broken; the validation loss of two."""
    for step, scores in (
        (0, {"dino": 0.2, "clip_t": 0.3}),
        (2, {"dino": 0.4, "clip_t": 0.25, "balance": 0.5}),
        (4, {}),
    ):
        pictures_of(tmp_path, step).mkdir(parents=True)
        (pictures_of(tmp_path, step) / "scores.json").write_text(json.dumps({"step": step, **scores}))
    pictures_of(tmp_path, 100).mkdir()
    (pictures_of(tmp_path, 100) / "scores.json").write_text(json.dumps({"dino": 1, "clip_t": 1, "balance": 1}))
    lines = [{"step": step, "loss": 1, "lr": 1, "time": 5} for step in (1, 2, 3)]
    lines[1]["validation_loss"], lines[2]["validation_loss"] = 0.75, 0.5
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_table_and_picture_have_every_step_that_was_scored(run):
    write_curve(run, 100, best=2)
    with (run / "validation" / "curve.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["step", "dino", "clip_t", "balance", "validation_loss"],
            ["0", "0.2", "0.3", "", ""],
            ["2", "0.4", "0.25", "0.5", "0.75"],
            ["3", "", "", "", "0.5"],
            ["100", "1.0", "1.0", "1.0", ""],
        ]
    picture = Image.open(run / "validation" / "curve.png")
    red = sum(count for count, colour in picture.convert("RGB").getcolors(1 << 20) if colour == (193, 18, 31))
    assert red > 100  # the line at the kept step
    write_curve(run, 100, best=None)
    picture = Image.open(run / "validation" / "curve.png")
    assert (193, 18, 31) not in {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}


def test_steps_that_a_resumed_run_has_not_come_to_again_are_left_out(run):
    write_curve(run, 2, best=None)
    assert "100" not in (run / "validation" / "curve.csv").read_text()


def test_without_anything_to_show_nothing_is_written(tmp_path):
    write_curve(tmp_path, 2, best=None)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_is_said(run):
    (run / "validation" / "curve.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*curve\.png: .*; checkpoints are intact"):
        write_curve(run, 2, best=None)
