"""Which settings a comparison's folder takes."""

from __future__ import annotations

import shutil
import unicodedata
from dataclasses import replace

import pytest
from tiny_eval import experiment, grid

from eval import engines
from eval.benchmark import run_benchmark
from eval.comparison_folder import left_out
from eval.experiment import Experiment
from eval.methods import METHODS
from gsoft_diffusion import UserError
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.scoring import encoders


def test_other_settings_need_another_folder(world, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(UserError, match="max_train_steps is 3 and was 2"):
        run_benchmark(experiment(world, methods=list(METHODS), curve_every=1, max_train_steps=3), out)


def test_photos_may_move_but_not_change(world, finished, tmp_path, in_process):
    out = shutil.copytree(finished, tmp_path / "out")
    moved = shutil.copytree(world / "subjects", tmp_path / "moved")
    settings = experiment(world, methods=list(METHODS), curve_every=1, subjects_dir=str(moved))
    run_benchmark(settings, out)
    assert read_yaml(out / "experiment.yaml")["subjects_dir"] == str(moved)
    next((moved / "cup").glob("*.png")).unlink()
    with pytest.raises(UserError, match=r"holds cells of other photos of cup than .*/moved has; put them back"):
        run_benchmark(settings, out)
    assert in_process == []


def test_changed_prompts_are_noticed_before_any_cell_runs(world, finished, tmp_path, in_process):
    out = shutil.copytree(finished, tmp_path / "out")
    prompts = tmp_path / "prompts.txt"
    shutil.copy(world / "prompts.txt", prompts)
    settings = (out / "experiment.yaml").read_text().replace(str(world / "prompts.txt"), str(prompts))
    (out / "experiment.yaml").write_text(settings)
    moved = experiment(world, methods=list(METHODS), curve_every=1, seeds=2, prompts=str(prompts))
    prompts.write_text("a {0} {1} on the beach\na blue {0} {1}\n")
    with pytest.raises(
        UserError, match=r"holds cells of other prompts of (rex, cup|cup, rex) than .*prompts\.txt has; put them"
    ):
        run_benchmark(moved, out)
    assert in_process == []


@pytest.fixture
def automatic(world, monkeypatch):
    """Default encoders, where only the miniatures can be had; counts how often the hub is asked."""
    asked = []

    def attempt():
        asked.append("hub")
        return "nobody is there"

    monkeypatch.setattr(encoders, "why_unreachable", attempt)
    monkeypatch.setattr(encoders, "FIELD_CLIP", "ViT-B-32/none_of_these")
    monkeypatch.setattr(encoders, "FIELD_DINO", "none/of_these")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(encoders, "MINI_CLIP", str(world / "mini_clip"))
    monkeypatch.setattr(encoders, "MINI_DINO", str(world / "mini_dino"))
    return asked


def test_encoders_are_settled_once_for_all_cells(world, tmp_path, automatic, in_process, capsys):
    run_benchmark(experiment(world, clip="auto", dino="auto"), tmp_path)
    assert len(in_process) > 2
    assert automatic == ["hub", "hub"]  # once for each of the two; hub_access makes that one attempt
    said = capsys.readouterr()
    assert said.out.count("encoders: miniature CLIP mini_clip") == 1
    assert said.err.count("scoring with the bundled") == 2
    settings = read_yaml(tmp_path / "experiment.yaml")
    assert (settings["clip"], settings["dino"]) == (str(world / "mini_clip"), str(world / "mini_dino"))


def test_a_comparison_goes_on_with_its_encoders_and_does_not_ask_again(world, tmp_path, automatic, in_process):
    run_benchmark(experiment(world, clip="auto", dino="auto", subjects=["rex"]), tmp_path)
    automatic.clear()
    run_benchmark(experiment(world, clip="auto", dino="auto"), tmp_path)
    assert automatic == []


def test_cells_of_other_encoders_are_noticed_before_any_is_run(world, finished, tmp_path, in_process):
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / "results.jsonl"
    lines = path.read_text().replace('"name":"mini_clip"', '"name":"big_clip"').splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"method":"boft"' not in line))
    shutil.rmtree(out / "work")
    with pytest.raises(UserError, match=r"cells that other encoders scored \(big_clip and mini_dino\)"):
        run_benchmark(experiment(world, methods=list(METHODS), curve_every=1), out)
    assert in_process == []


def test_a_base_that_cannot_be_had_is_said_before_any_cell(world, tmp_path, in_process):
    with pytest.raises(UserError, match=r"no model folder \./nowhere"):
        run_benchmark(experiment(world, pretrained_model_name_or_path="./nowhere"), tmp_path / "out")
    assert in_process == []
    assert not (tmp_path / "out").exists()


def test_folders_named_in_another_normal_form_are_kept_as_they_are_on_disk(world, tmp_path, monkeypatch):
    composed = unicodedata.normalize("NFC", "Café")
    folder = tmp_path / unicodedata.normalize("NFD", composed)
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert experiment(world, subjects_dir=composed).anchored().subjects_dir == str(folder)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"subjects": ["rex"]}, "subject cup"),
        (
            {"methods": ["double_gsoft", "lora"]},
            "method gsoft, method dora, method boft, method oft, method hra, method lokr, method full",
        ),
        ({"learning_rates": {"double_gsoft": [1e-3], "lora": [1e-3]}}, r"double_gsoft's learning rate 0\.01"),
    ],
)
def test_a_report_is_not_replaced_by_one_of_less(world, finished, tmp_path, in_process, changes, lost):
    out = shutil.copytree(finished, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=f"its report has {lost} as well"):
        run_benchmark(experiment(world, **{"methods": list(METHODS), "curve_every": 1} | changes), out)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_fewer_seeds_and_budgets_are_less():
    more = Experiment(seeds=3, budgets=("small", "medium"), sweep_subjects=2)
    less = replace(more, seeds=1, budgets=("small",), sweep_subjects=1)
    assert left_out(more, less) == ["budget medium", "3 seeds", "2 subjects in its sweep"]
    assert left_out(less, more) == []


def test_a_grid_needs_two_subjects(world, tmp_path):
    with pytest.raises(UserError, match="grid: chooses each subject's setting on the others; give two subjects"):
        run_benchmark(grid(world, subjects=["rex"]), tmp_path)


def test_a_single_photo_is_refused(world, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(world / "subjects" / "rex" / "0.png", folder)
    with pytest.raises(UserError, match="photos: the balance needs at least two photos"):
        run_benchmark(experiment(world, subjects_dir=str(folder), class_word="dog"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_extension_that_was_begun_and_dropped_locks_nothing(world, finished, tmp_path, in_process, monkeypatch):
    """The report keeps its settings until there is another one, so the former comparison can go on."""
    out = shutil.copytree(finished, tmp_path / "out")
    before = (out / "experiment.yaml").read_bytes()
    comparison = experiment(world, methods=list(METHODS), curve_every=1)
    monkeypatch.setitem(engines.ENGINES, "local", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(replace(comparison, budgets=("small", "medium")), out)
    assert (out / "experiment.yaml").read_bytes() == before
    run_benchmark(comparison, out)


def stopped(experiment, cells, out, workers):
    raise KeyboardInterrupt
