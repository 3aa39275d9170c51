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
TEXTS = ("report.md", "table.csv", "fronts.csv", "settings.csv")


def test_results_are_few_small_files():
    paths = [path for path in FOLDER.rglob("*") if path.is_file() and "work" not in path.relative_to(FOLDER).parts]
    assert len(paths) < 100
    assert sum(path.stat().st_size for path in paths) < 36 * 2**20  # both fronts have 1,932 cells of 13 kB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block_sizes", "block_sizes_cayley", "fronts_trial", "fronts", "fronts_dreambooth"])
def test_reports_follow_from_the_results(name, tmp_path):
    out = shutil.copytree(FOLDER / name, tmp_path / name, ignore=shutil.ignore_patterns(work_folder(FOLDER).name))
    for text in TEXTS:
        (out / text).unlink()
    write_report(Experiment.from_dict(read_yaml(out / SETTINGS)), out)
    assert {text: (out / text).read_bytes() for text in TEXTS} == {
        text: (FOLDER / name / text).read_bytes() for text in TEXTS
    }
