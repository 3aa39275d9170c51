"""The results in this repository."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eval.experiment import Experiment
from eval.report.write import write_report
from eval.results import SETTINGS, work_folder
from gsoft_diffusion.config.settings import read_yaml

FOLDER = Path(__file__).resolve().parents[2] / "results"
OF_A_SWEEP = ("report.md", "table.csv", "learning_rates.csv")
OF_A_GRID = ("report.md", "table.csv", "fronts.csv", "settings.csv")


def test_results_are_few_small_files():
    paths = [path for path in FOLDER.rglob("*") if path.is_file() and "work" not in path.relative_to(FOLDER).parts]
    assert len(paths) < 100
    assert (
        sum(path.stat().st_size for path in paths) < 32 * 2**20
    )  # the fronts have 1,740 cells of 12 kB, those of real photos included


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini", "mini_sizes", "fronts_trial", "fronts"])
def test_reports_follow_from_the_results(name, tmp_path):
    out = shutil.copytree(FOLDER / name, tmp_path / name, ignore=shutil.ignore_patterns(work_folder(FOLDER).name))
    experiment = Experiment.from_dict(read_yaml(out / SETTINGS))
    texts = OF_A_GRID if experiment.grid else OF_A_SWEEP
    for text in texts:
        (out / text).unlink()
    write_report(experiment, out)
    assert {text: (out / text).read_bytes() for text in texts} == {
        text: (FOLDER / name / text).read_bytes() for text in texts
    }
