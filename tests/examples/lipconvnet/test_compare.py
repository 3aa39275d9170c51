from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples.lipconvnet import compare, report
from examples.lipconvnet.pictures import Pictures
from examples.lipconvnet.training import Run
from gsoft_diffusion.foundation.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
QUICK = "--depth 5 --width 8 --batch_size 16 --epochs 1 --attacked 0 --seeds 0 --step_repetitions 2"


def run(monkeypatch, out, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compare", *QUICK.split(), "--folder", "none", "--out", str(out), *options])
    return compare.main()


@pytest.fixture
def few_rows(monkeypatch, pictures: Pictures):
    monkeypatch.setattr(compare, "ROWS", (compare.ROWS[0], compare.ROWS[1], compare.ROWS[5]))
    monkeypatch.setattr(compare, "read_pictures", lambda args, seed: pictures)


def test_a_comparison_that_was_stopped_does_only_what_is_missing(few_rows, tmp_path, monkeypatch, capsys):
    out, trained = tmp_path / "out", []

    def until_the_second(settings, pictures, checkpoint, progress) -> Run:
        trained.append(settings.convolutions.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(settings, pictures, checkpoint, progress)

    train = compare.train
    monkeypatch.setattr(compare, "train", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, out)
    assert run(monkeypatch, out) == 0
    assert trained == ["SOC", "(4,–)", "(4,–)", "(4,–) not paired"]
    runs = {path.name: json.loads(path.read_text()) for path in (out / "runs").iterdir()}
    assert {name: run["name"] for name, run in runs.items()} == {
        "soc-0.json": "SOC",
        "4-none-0.json": "(4,–)",
        "4-none-not-paired-0.json": "(4,–) not paired",
    }
    assert runs["soc-0.json"]["groups"] is None
    assert len(runs["soc-0.json"]["history"]) == 1
    seconds = json.loads((out / "step_seconds.json").read_text())["seconds"]
    assert {name: len(steps) for name, steps in seconds.items()} == {"SOC": 2, "(4,–)": 2, "(4,–) not paired": 2}
    assert not (out / "work" / "0").exists()
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "report.md").read_text().strip()
    assert "attack" not in printed.lower()
    assert (out / "accuracy.png").stat().st_size > 5000
    assert run(monkeypatch, out) == 0
    assert len(trained) == 4
    with pytest.raises(UserError, match=r"out has results of other settings \(--width\); give another --out"):
        run(monkeypatch, out, "--width", "16")


def test_a_width_that_one_kind_does_not_take(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--width or --groups does not fit"):
        run(monkeypatch, tmp_path, "--depth", "10", "--width", "6")


def test_settings_that_are_none(few_rows, tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match=r"settings\.json has no settings of this program; give another --out"):
        run(monkeypatch, tmp_path)
    assert (tmp_path / "settings.json").read_text() == "[]"


def test_a_seed_that_another_process_is_at_work_on(few_rows, tmp_path, monkeypatch):
    def locked(folder):
        raise BlockingIOError("process 7 on host")

    monkeypatch.setattr(compare, "locked", locked)
    with pytest.raises(UserError, match=r"^--seeds 0: process 7 on host is at work on it; wait for it"):
        run(monkeypatch, tmp_path)


def record(name: str, seed: int, accuracy: float, certified: float) -> dict:
    scores = {
        "accuracy": accuracy,
        "certified": certified,
        "attacked_accuracy": certified,
        "attacked_certified": certified,
        "attacked": 100,
        "beaten": 0,
    }
    counts = {"learned_numbers": 1000, "parameters_as_in_paper": 2000}
    return {"name": name, "seed": seed, "scores": {"test": scores}, **counts}


SETTINGS = {"depth": 5, "width": 8, "epochs": 2, "attack_steps": 20}
SECONDS = {"SOC": [1.0, 2.0, 4.0], "(4,–)": [0.5, 1.0, 3.0], "(4,–) not paired": [1.0, 1.0, 1.0]}
RUNS = [
    *(record("SOC", seed, 0.5 + seed / 10, 0.2) for seed in range(3)),
    *(record("(4,–)", seed, 0.6 + seed / 10, 0.2 + seed / 10) for seed in range(3)),
    *(record("(4,–) not paired", seed, 0.4 + seed / 10, 0.1) for seed in range(3)),
    record("SOC", 3, 0.9, 0.9),  # of a seed that is not complete
]


@pytest.fixture
def folder(tmp_path):
    """A comparison's folder."""
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "step_seconds.json").write_text(json.dumps({"seconds": SECONDS}))
    (tmp_path / "runs").mkdir()
    for number, content in enumerate(RUNS):
        (tmp_path / "runs" / f"{number}.json").write_text(json.dumps(content))
    return tmp_path


def test_tables_have_means_paired_differences_and_their_intervals(folder):
    text = report.report(report.read_results(folder))
    assert "3 seeds" in text
    assert "| SOC | 1,000 | 2,000 | 1 | 60.0 | 20.0 | 20.0 |" in text
    # 0, 10 and 20 points more: 10 ± 4.30 · 10 / √3
    assert (
        "| (4,–) | 1,000 | 2,000 | 0.50 (0.50 to 0.62) | 70.0 (+10.0, +10.0 to +10.0) | 30.0 (+10.0, -14.8 to +34.8)"
        in text
    )
    assert "| (4,–) | +20.0, +20.0 to +20.0 | +20.0, -4.8 to +44.8 |" in text


def test_without_an_attack_nothing_is_shown_of_one(folder):
    def shown() -> tuple[str, list[str]]:
        results = report.read_results(folder)
        (legend,) = report.accuracy_plot(results).legends
        return report.report(results), [text.get_text() for text in legend.get_texts()]

    text, series = shown()
    assert "certified | attacked |" in text
    assert series == ["accuracy", "attacked accuracy", "certified"]
    for path in (folder / "runs").iterdir():
        content = json.loads(path.read_text())
        content["scores"]["test"] |= {"attacked": 0, "attacked_accuracy": None, "attacked_certified": None}
        path.write_text(json.dumps(content))
    text, series = shown()
    assert "attack" not in text.lower()
    assert "| SOC | 1,000 | 2,000 | 1 | 60.0 | 20.0 |\n" in text
    assert series == ["accuracy", "certified"]


def test_flags_without_effect_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^--attack_steps would have no effect: --attacked 0 attacks nothing"):
        run(monkeypatch, tmp_path / "out", "--attack_steps", "2")
    with pytest.raises(UserError, match=r"^--held_out would have no effect: CIFAR-100 has its own numbers"):
        run(monkeypatch, tmp_path / "out", "--data", "cifar100", "--held_out", "7")
    assert not (tmp_path / "out").exists()


def test_the_page_is_written_again_from_its_results(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    assert report.main() == 0
    assert (folder / "report.md").read_text() == report.report(report.read_results(folder)) + "\n"


def test_a_folder_without_a_whole_comparison(folder):
    for name in ("1.json", "5.json", "6.json"):
        (folder / "runs" / name).unlink()
    with pytest.raises(UserError, match="has no seed from which every kind of network was trained"):
        report.write_report(folder)
    (folder / "settings.json").unlink()
    with pytest.raises(UserError, match=r"has no whole comparison: .*settings\.json"):
        report.write_report(folder)


def test_the_committed_comparison_is_on_its_page_and_no_certificate_was_beaten():
    committed = REPOSITORY / "results" / "lipconvnet"
    results = report.read_results(committed)
    text = report.report(results)
    assert (committed / "report.md").read_text() == f"{text}\n"
    page = (REPOSITORY / "docs" / "lipconvnet.md").read_text()
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    assert all(table in page for table in tables)
    scores = [run["scores"]["test"] for run in results["runs"]]
    assert len(scores) == 3 * len(compare.ROWS)
    assert all(found["beaten"] == 0 for found in scores)
    assert all(found["attacked_certified"] <= found["attacked_accuracy"] for found in scores)
