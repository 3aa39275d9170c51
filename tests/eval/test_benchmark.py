"""A whole comparison on a tiny random model with tiny random encoders, and its parts."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch
from PIL import Image
from tiny_eval import write_world

from eval import benchmark, cell, engines, report
from eval.baselines import BaselineConfig
from eval.benchmark import plan, run_benchmark
from eval.cell import read_result, read_results, run_cell
from eval.experiment import Cell, Experiment, main_cells, sweep_cells
from eval.methods import METHODS, adapted_layers, count_parameters, matched
from gsoft_diffusion import UserError
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.scoring import encoders


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def experiment(world: Path, **changes) -> Experiment:
    settings = {
        "subjects_dir": str(world / "subjects"),
        "pretrained_model_name_or_path": str(world / "base"),
        "clip": str(world / "mini_clip"),
        "dino": str(world / "mini_dino"),
        "prompts": str(world / "prompts.txt"),
        "methods": ["double_gsoft", "lora"],
        "budgets": ["medium"],
        "learning_rates": {"double_gsoft": [1e-3, 1e-2], "lora": [1e-3]},
        "seeds": 1,
        "sweep_subjects": 1,
        "max_train_steps": 2,
        "train_batch_size": 1,
        "images_per_prompt": 1,
        "base_images": 2,
        "class_images": 1,
        "unrelated_images": 1,
        "sampler": {"num_inference_steps": 2},
    }
    return Experiment.from_dict(settings | changes)


@pytest.fixture
def in_process(monkeypatch):
    """Cells run here, one after the other; returns the ids of those that ran."""
    ran: list[str] = []

    def run_here(experiment, cells, out, workers):
        for each in cells:
            run_cell(experiment, each, out)
            ran.append(each.id)

    monkeypatch.setitem(engines.ENGINES, "local", run_here)
    return ran


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """The output folder of a finished comparison. Read only."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(
            engines.ENGINES, "local", lambda e, cells, out, workers: [run_cell(e, c, out) for c in cells]
        )
        run_benchmark(experiment(world, methods=list(METHODS), curve_every=1), out)
    return out


def test_comparison_ends_in_a_report(world, finished):
    rows = list(csv.DictReader((finished / "table.csv").open()))
    assert [row["method"] for row in rows] == ["photos", "base", "double_gsoft", "gsoft", "lora", "boft", "oft", "full"]
    assert all(-1 <= float(row["dino_low"]) <= float(row["dino_mean"]) <= float(row["dino_high"]) <= 1 for row in rows)
    assert all(float(row["balance_mean"]) >= 0 for row in rows[2:])
    sweep = list(csv.DictReader((finished / "learning_rates.csv").open()))
    assert [row["steps"] for row in sweep] == ["1", "2"] * (len(sweep) // 2)  # before the end too
    assert {row["steps"] for row in sweep if row["chosen"]} == {"2"}
    assert len({row["DINO ↑"] for row in sweep}) > 1
    text = (finished / "report.md").read_text()
    assert report.MINIATURE in text
    assert "rank" in text
    assert "Double GSOFT minus" in text
    page = (finished / "report.html").read_text()
    assert page.count("<svg") == 3  # Pareto plot, curves, and below them the learning rates
    assert page.index("<svg") < page.index("<h2>Learning rates</h2>") < page.rindex("<svg")
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # nothing is fetched
    assert page.count("<details") == 2
    assert all((finished / f"{plot}.svg").read_text().startswith("<?xml") for plot in ("pareto", "learning_rates"))


def test_results_say_where_they_come_from(world, finished):
    results = [result for result in read_results(finished) if result["cell"]["method"] == "boft"]
    result = next(result for result in results if result["cell"]["subject"] == "rex")
    assert result["method"]["method"] == "boft"
    assert result["method"]["nfactors"] >= 2
    assert result["orthogonality_error"] < 1e-4
    assert result["encoders"]["clip"]["weights"] != result["encoders"]["dino"]["weights"]
    assert {"torch", "peft", "diffusers"} <= result["versions"].keys()
    assert result["training"]["max_train_steps"] == 2
    assert str(world) not in json.dumps(result)  # nor how the machine's folders are called
    assert [point["step"] for point in result["curve"]] == [1, 2]
    kinds = [picture["kind"] for picture in result["pictures"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"context": 2, "base": 2, "class": 1, "unrelated": 4}
    assert result["pictures"][0]["prompt"] == "a sks dog on the beach"
    assert result["pictures"][0]["caption"] == "a dog on the beach"
    folder = finished / "cells" / Cell(**result["cell"]).id
    assert all((folder / picture["file"]).is_file() for picture in result["pictures"])


def test_methods_share_prompts_seeds_and_budget(finished):
    results = [r for r in read_results(finished) if r["cell"]["subject"] == "rex" and r["cell"]["method"] != "base"]
    asked = {tuple((p["prompt"], p["seed"]) for p in result["pictures"]) for result in results}
    assert len(asked) == 1
    target = 0.133 * results[0]["full_parameters"]
    for result in results:
        if result["cell"]["method"] != "full":
            assert 0.6 < result["parameters"] / target < 1.6


def test_a_finished_comparison_runs_nothing_again(world, finished, in_process, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = (out / "report.html").read_text()
    run_benchmark(experiment(world, methods=list(METHODS), curve_every=1), out)
    assert in_process == []
    assert (out / "report.html").read_text() == before


def test_a_killed_cell_is_not_counted_and_runs_again(world, tmp_path, monkeypatch, in_process):
    settings, which = experiment(world), Cell("lora", "medium", 1e-3, "rex", 0)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cell, "_save", killed)  # after training, drawing and scoring
        with pytest.raises(KeyboardInterrupt):
            run_cell(settings, which, tmp_path)
    assert not cell.is_done(which, tmp_path)
    assert read_results(tmp_path) == []
    run_cell(settings, which, tmp_path)
    assert cell.is_done(which, tmp_path)


def test_a_training_that_was_stopped_is_not_counted(world, tmp_path, monkeypatch):
    train = cell.train
    monkeypatch.setattr(cell, "train", lambda *arguments: replace(train(*arguments), interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        run_cell(experiment(world), Cell("lora", "medium", 1e-3, "rex", 0), tmp_path)
    assert read_results(tmp_path) == []


def test_class_images_are_drawn_once_for_all_cells(world, tmp_path):
    settings = experiment(world, with_prior_preservation=True, num_class_images=2)
    for method in ("base", "lora", "double_gsoft"):
        budget, rate = (None, None) if method == "base" else ("medium", 1e-3)
        run_cell(settings, Cell(method, budget, rate, "rex", 0), tmp_path)
        images = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "class_images").glob("dog-*/*")}
        assert len(images) == 2
        if method == "base":
            drawn = images
        assert images == drawn


def test_a_cell_gives_the_same_scores_again(world, finished, tmp_path):
    which = next(Cell(**r["cell"]) for r in read_results(finished) if r["cell"]["method"] == "double_gsoft")
    run_cell(experiment(world), which, tmp_path)
    assert read_result(which, tmp_path)["scores"] == read_result(which, finished)["scores"]


@pytest.mark.parametrize("text_encoder", [True, False])
def test_the_text_encoder_learns_at_the_methods_rate_or_not_at_all(world, tmp_path, in_process, text_encoder):
    run_benchmark(experiment(world, text_encoder=text_encoder, subjects=["rex"]), tmp_path)
    tuned = [result for result in read_results(tmp_path) if result["cell"]["method"] != "base"]
    assert {result["cell"]["method"] for result in tuned} == {"double_gsoft", "lora"}
    for result in tuned:
        assert result["method"]["text_encoder"] is text_encoder
        expected = result["cell"]["learning_rate"] if text_encoder else None
        assert result["training"]["text_encoder_lr"] == expected


def test_divergence_is_a_result_without_scores(world, tmp_path, in_process):
    rates = {"double_gsoft": [1e-3, 1e30], "lora": [1e-3]}
    settings = experiment(world, learning_rates=rates, max_train_steps=4, subjects=["rex"])
    run_benchmark(settings, tmp_path)
    assert report.choose_learning_rates(settings, tmp_path)["double_gsoft"] == 1e-3
    sweep = (tmp_path / "learning_rates.csv").read_text()
    assert "1e+30,diverged" in sweep


def test_other_settings_need_another_folder(world, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(UserError, match="max_train_steps is 3 and was 2"):
        run_benchmark(experiment(world, methods=list(METHODS), curve_every=1, max_train_steps=3), out)


def test_a_picture_that_is_gone_is_named(world, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for picture in (out / "cells").glob("*/context-*.png"):
        picture.unlink()
    with pytest.raises(UserError, match=r"context-\S+\.png: damaged .*: delete \S+ and run eval.benchmark again"):
        report.write_report(experiment(world, methods=list(METHODS), curve_every=1), out)


def test_a_picture_too_large_for_the_report_is_named(world, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    for picture in (out / "cells").glob("*/context-*.png"):
        shutil.copy(tmp_path / "large.png", picture)
    with pytest.raises(UserError, match=r"context-\S+\.png: too large .*: delete \S+ and run eval.benchmark again"):
        report.write_report(experiment(world, methods=list(METHODS), curve_every=1), out)


def test_incomplete_cells_make_no_table(world, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    gone = next(r for r in read_results(out) if r["cell"]["method"] == "boft")
    shutil.rmtree(out / "cells" / Cell(**gone["cell"]).id)
    with pytest.raises(UserError, match="boft medium lacks cells"):
        report.write_report(experiment(world, methods=list(METHODS), curve_every=1), out)


@pytest.mark.parametrize(
    ("fact", "what"), [("encoders", "encoders"), ("base_model", "base model"), ("photos_hash", "photos of (rex|cup)")]
)
def test_cells_that_do_not_compare_make_no_table(world, finished, tmp_path, fact, what):
    out = shutil.copytree(finished, tmp_path / "out")
    path = next((out / "cells").glob("boft*")) / "result.json"
    result = json.loads(path.read_text())
    assert fact in result
    another = {"name": "base", "fingerprint": "another"} if fact == "base_model" else "another"
    path.write_text(json.dumps(result | {fact: another}))
    with pytest.raises(UserError, match=f"cells/{path.parent.name}: made with other {what} than the rest"):
        report.write_report(experiment(world, methods=list(METHODS), curve_every=1), out)


# What has one answer for all cells


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
    for path in (out / "cells").glob("*/result.json"):
        result = json.loads(path.read_text())
        result["encoders"]["clip"]["name"] = "big_clip"
        path.write_text(json.dumps(result))
    shutil.rmtree(next((out / "cells").glob("boft*")))
    with pytest.raises(UserError, match=r"cells that other encoders scored \(big_clip and mini_dino\)"):
        run_benchmark(experiment(world, methods=list(METHODS), curve_every=1), out)
    assert in_process == []


def test_workers_do_not_ask_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    engines._start_worker(torch.get_num_threads())
    assert huggingface_hub.is_offline_mode()


def test_a_base_that_cannot_be_had_is_said_before_any_cell(world, tmp_path, in_process):
    with pytest.raises(UserError, match=r"no model folder \./nowhere"):
        run_benchmark(experiment(world, pretrained_model_name_or_path="./nowhere"), tmp_path / "out")
    assert in_process == []
    assert not (tmp_path / "out").exists()


def test_a_report_can_be_written_from_any_folder(world, finished, tmp_path, monkeypatch, in_process):
    """Paths that were given relative to one."""
    monkeypatch.chdir(world)
    places = {"subjects_dir": "subjects", "pretrained_model_name_or_path": "base", "prompts": "prompts.txt"}
    settings = experiment(world, subjects=["rex"], clip="mini_clip", dino="mini_dino", **places)
    run_benchmark(settings, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "out")])
    assert report.main() == 0
    monkeypatch.chdir(world)
    in_process.clear()
    run_benchmark(settings, tmp_path / "out")
    assert in_process == []


def test_folders_named_in_another_normal_form_are_kept_as_they_are_on_disk(world, tmp_path, monkeypatch):
    composed = unicodedata.normalize("NFC", "Café")
    folder = tmp_path / unicodedata.normalize("NFD", composed)
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert experiment(world, subjects_dir=composed).anchored().subjects_dir == str(folder)


# What is finished stays


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"subjects": ["rex"]}, "subject cup"),
        ({"methods": ["double_gsoft", "lora"]}, "method gsoft, method boft, method oft, method full"),
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
    assert benchmark.left_out(more, less) == ["budget medium", "3 seeds", "2 subjects in its sweep"]
    assert benchmark.left_out(less, more) == []


def test_a_comparison_in_which_all_diverged_is_no_success(world, tmp_path, in_process):
    rates = {"double_gsoft": [1e30], "lora": [1e30]}
    settings = experiment(world, learning_rates=rates, max_train_steps=4, subjects=["rex"])
    with pytest.raises(UserError, match="every training diverged"):
        run_benchmark(settings, tmp_path)
    assert "Training diverged" in (tmp_path / "report.md").read_text()


# One of a kind


def test_a_single_score_has_no_interval(world, tmp_path, in_process):
    run_benchmark(experiment(world, subjects=["rex"], seeds=1), tmp_path)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert all(row["dino_mean"] and not row["dino_low"] and not row["dino_high"] for row in rows)
    text = (tmp_path / "report.md").read_text()
    assert "[–]" in text
    assert not re.search(r"\[[+-]?\d", text)
    assert "no interval, since one subject and one seed say nothing of how scores spread" in text
    assert "one subject and one seed, so no intervals" in (tmp_path / "pareto.svg").read_text()


def test_intervals_of_one_subject_are_said_to_be_of_one(world, tmp_path, in_process):
    run_benchmark(experiment(world, subjects=["rex"], seeds=2, methods=["lora"]), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "intervals over seeds, which say nothing of other subjects (–: of a single score there is none)" in text
    photos, *others = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert not photos["dino_low"]  # the photos are scored once
    assert all(float(row["dino_low"]) <= float(row["dino_mean"]) for row in others)


def test_photos_are_shown_upright(world, tmp_path):
    turned = Image.new("RGB", (40, 20), "red")
    turned.save(tmp_path / "photo.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    page = report._image(open_image(tmp_path / "photo.jpg"), "a photo")
    data = base64.b64decode(page.partition("base64,")[2].partition('"')[0])
    assert Image.open(io.BytesIO(data)).size == (20, 40)


def test_plan_lists_cells_time_and_disk(world, tmp_path):
    text = plan(experiment(world, seeds=3), tmp_path / "none", workers=2)
    assert "2 subjects: cup (cup), rex (dog)" in text
    assert "base model and photos: 6 cells, 0 done" in text
    assert "learning rates: 2 cells" in text
    assert "comparison: 12 cells" in text
    assert "GB of pictures" in text
    assert not (tmp_path / "none").exists()


def test_plan_is_made_without_the_base_model(world, tmp_path):
    text = plan(experiment(world, pretrained_model_name_or_path="./nowhere", resolution=512), tmp_path, workers=1)
    assert "sizes are listed where the base model is: there is no model folder ./nowhere" in text
    assert "pictures of 512 px" in text


@pytest.mark.parametrize("name", ["mini", "mini_sizes", "mini_unscaled", "paper", "own"])
def test_committed_experiments_are_valid(name):
    settings = read_yaml(Path("eval/experiments") / f"{name}.yaml")
    assert Experiment.from_dict(settings).methods


def test_sweep_and_comparison_share_cells(world):
    settings = experiment(world, seeds=2)
    sweep, main = sweep_cells(settings), main_cells(settings, {"double_gsoft": 1e-2, "lora": 1e-3})
    assert [c.id for c in sweep] == [
        "double_gsoft--medium--lr0.001--cup--seed0",
        "double_gsoft--medium--lr0.01--cup--seed0",
    ]
    assert len(main) == len(set(main)) == 8
    assert sweep[1] in main
    assert sweep[0] not in main


@pytest.mark.parametrize("budget", ["small", "medium", "large"])
@pytest.mark.parametrize("method", METHODS)
def test_sizes_come_near_the_budget(method, budget, world):
    model = load_model(str(world / "base"))
    layers = adapted_layers(model.unet, [model.text_encoder], True)
    full = count_parameters(BaselineConfig("full"), layers)
    count = count_parameters(matched(method, budget, layers, True), layers)
    if method == "full":
        assert count == full
    else:
        assert 0.5 < count / full / {"small": 0.066, "medium": 0.133, "large": 0.266}[budget] < 2


def test_our_methods_are_sized_without_their_scale_too(world):
    model = load_model(str(world / "base"))
    layers = adapted_layers(model.unet, [model.text_encoder], True)
    outputs = sum(layer.out_features for layer in layers.values())
    for method in ("gsoft", "double_gsoft"):
        with_scale, without = (matched(method, "medium", layers, True, output_scale) for output_scale in (True, False))
        assert (with_scale.output_scale, without.output_scale) == (True, False)
        scaled = count_parameters(replace(without, output_scale=True), layers)
        assert scaled - count_parameters(without, layers) == outputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["dora"]}, "methods: dora; choose from double_gsoft"),
        ({"budgets": []}, "budgets: nothing; choose from small"),
        ({"learning_rates": {"lora": []}}, "learning_rates.lora: give one or more"),
        ({"learning_rates": {"lora": ["fast"]}}, "lora: .* is not a list of numbers"),
        ({"seeds": 0}, "--seeds 0: must be more than 0"),
        ({"mixed_precision": "fp8"}, "mixed_precision: fp8; choose from no, "),
        ({"step": 3}, "unknown setting step"),
        ({"num_class_images": 3}, "num_class_images would have no effect"),
        ({"curve_every": 400}, "curve_every would have no effect"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        Experiment.from_dict(settings)


def test_a_single_photo_is_refused(world, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(world / "subjects" / "rex" / "0.png", folder)
    with pytest.raises(UserError, match="photos: the balance needs at least two photos"):
        run_benchmark(experiment(world, subjects_dir=str(folder), class_word="dog"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_subjects_are_named(world):
    with pytest.raises(UserError, match=r"subjects: max is not in .*; there are cup, rex"):
        experiment(world, subjects=["max"]).chosen_subjects()


def test_engines_that_are_not_installed_say_so(world, tmp_path):
    for name in ("submitit", "ray"):
        try:
            __import__(name)
        except ImportError:
            with pytest.raises(UserError, match=f"pip install {name}"):
                run_benchmark(experiment(world), tmp_path, engine=name)


def test_submitit_is_refused_where_there_is_no_slurm(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", ModuleType("submitit"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="there is no Slurm here"):
        run_benchmark(experiment(world), tmp_path, engine="submitit")


@pytest.mark.slow
def test_after_a_failure_no_cell_is_started(world, tmp_path):
    broken = Cell("double_gsoft", "medium", 1e-3, "rex", 0)
    cells = [broken, *(replace(broken, seed=seed) for seed in range(1, 6))]
    settings = replace(experiment(world), pretrained_model_name_or_path="./nowhere")
    with pytest.raises(UserError, match="no model folder"):
        engines.run_locally(settings, cells, tmp_path, workers=1)
    assert len(list((tmp_path / "logs").iterdir())) < len(cells)


@pytest.mark.slow
def test_local_workers_run_cells_in_processes(world, tmp_path):
    cells = [Cell("base", None, None, name, 0) for name in ("rex", "cup")]
    engines.run_locally(experiment(world), cells, tmp_path, workers=2)
    assert all(cell.is_done(each, tmp_path) for each in cells)
    assert len(list((tmp_path / "logs").iterdir())) == 2
    assert benchmark._measured(tmp_path).keys() == {"base"}
