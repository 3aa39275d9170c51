"""A whole comparison on a tiny random model with tiny random encoders, and its parts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_eval import experiment, grid

from eval import run_cell as running
from eval.baselines import BaselineConfig, adapted_layers
from eval.benchmark import run_benchmark
from eval.cells import Cell, grid_cells, main_cells, sweep_cells
from eval.comparison_folder import left_out
from eval.experiment import Experiment, number_of
from eval.methods import ABLATIONS, METHODS, adapts_text_encoder, count_parameters, matched
from eval.plan import plan
from eval.report.rates import choose_learning_rates
from eval.results import all_results, cell_folder, is_done, read_results
from eval.run_cell import run_cell
from gsoft_diffusion import UserError
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.models.loading import load_model

EXPERIMENTS = Path(__file__).parents[2] / "eval" / "experiments"


def test_results_say_where_they_come_from(world, finished):
    which, result = next((c, r) for c, r in read_results(finished).items() if (c.method, c.subject) == ("boft", "rex"))
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
    assert all((cell_folder(which, finished) / picture["file"]).is_file() for picture in result["pictures"])


def test_methods_share_prompts_seeds_and_budget(finished):
    results = [r for c, r in read_results(finished).items() if c.subject == "rex" and c.method != "base"]
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
        patch.setattr(running, "save", killed)  # after training, drawing and scoring
        with pytest.raises(KeyboardInterrupt):
            run_cell(settings, which, tmp_path)
    assert not is_done(which, tmp_path)
    assert all_results(tmp_path) == {}
    run_cell(settings, which, tmp_path)
    assert is_done(which, tmp_path)


def test_a_training_that_was_stopped_is_not_counted(world, tmp_path, monkeypatch):
    train = running.train
    monkeypatch.setattr(running, "train", lambda *arguments: replace(train(*arguments), interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        run_cell(experiment(world), Cell("lora", "medium", 1e-3, "rex", 0), tmp_path)
    assert all_results(tmp_path) == {}


def test_class_images_are_drawn_once_for_all_cells(world, tmp_path):
    settings = experiment(world, with_prior_preservation=True, num_class_images=2)
    for method in ("base", "lora", "double_gsoft"):
        budget, rate = (None, None) if method == "base" else ("medium", 1e-3)
        run_cell(settings, Cell(method, budget, rate, "rex", 0), tmp_path)
        images = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work" / "class_images").glob("dog-*/*")}
        assert len(images) == 2
        if method == "base":
            drawn = images
        assert images == drawn


@pytest.mark.parametrize("method", ["double_gsoft", "lora", "lokr"])  # fixed at the start, or drawn in either way
def test_a_cell_gives_the_same_scores_again(world, finished, tmp_path, method):
    which = next(each for each in read_results(finished) if each.method == method)
    run_cell(experiment(world), which, tmp_path)
    assert all_results(tmp_path)[which]["scores"] == read_results(finished)[which]["scores"]


@pytest.mark.parametrize("text_encoder", [True, False])
def test_the_text_encoder_learns_at_the_methods_rate_or_not_at_all(world, tmp_path, in_process, text_encoder):
    run_benchmark(experiment(world, text_encoder=text_encoder, subjects=["rex"]), tmp_path)
    tuned = [result for each, result in read_results(tmp_path).items() if each.method != "base"]
    assert {result["cell"]["method"] for result in tuned} == {"double_gsoft", "lora"}
    for result in tuned:
        assert result["method"]["text_encoder"] is text_encoder
        expected = result["cell"]["learning_rate"] if text_encoder else None
        assert result["training"]["text_encoder_lr"] == expected


def test_divergence_is_a_result_without_scores(world, tmp_path, in_process):
    rates = {"double_gsoft": [1e-3, 1e30], "lora": [1e-3]}
    settings = experiment(world, learning_rates=rates, max_train_steps=4, subjects=["rex"])
    run_benchmark(settings, tmp_path)
    assert choose_learning_rates(settings, read_results(tmp_path))["double_gsoft"] == 1e-3
    sweep = (tmp_path / "learning_rates.csv").read_text()
    assert "1e+30,diverged" in sweep


def test_a_changed_base_is_noticed_by_the_base_models_own_cells(world, finished, tmp_path, in_process):
    out = shutil.copytree(finished, tmp_path / "out")
    base = shutil.copytree(world / "base", tmp_path / "base")
    settings = (out / "experiment.yaml").read_text().replace(str(world / "base"), str(base))
    (out / "experiment.yaml").write_text(settings)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}, weights)
    other = experiment(world, methods=list(METHODS), curve_every=1, seeds=2, pretrained_model_name_or_path=str(base))
    with pytest.raises(UserError, match=r"base--(rex|cup)--seed1.*made with other base model than the rest"):
        run_benchmark(other, out)
    assert sorted(in_process) == ["base--cup--seed1", "base--rex--seed1"]


def test_captions_are_the_same_for_the_base_model_the_photos_and_what_is_tuned(world, tmp_path, in_process):
    run_benchmark(experiment(world, subjects=["rex"], methods=["lora"], token_in_caption=True), tmp_path)
    results = read_results(tmp_path)
    captions = {
        cell.method: {(each["kind"], each["caption"]) for each in result["pictures"]}
        for cell, result in results.items()
    }
    assert captions["base"] == captions["lora"]
    assert ("context", "a sks dog on the beach") in captions["base"]
    base = next(result for cell, result in results.items() if cell.method == "base")
    assert "a sks dog on the beach" in base["photos"]["clip_t_by_caption"]
    assert {each["prompt"] for each in base["pictures"] if each["kind"] == "context"} == {
        "a dog on the beach",
        "a red dog",
    }


def test_a_cell_that_finished_before_its_run_was_killed_does_not_run_again(world, tmp_path, in_process):
    settings = experiment(world, subjects=["rex"])
    run_cell(settings, Cell("lora", "medium", 1e-3, "rex", 0), tmp_path)
    run_benchmark(settings, tmp_path)
    assert "lora--medium--lr0.001--rex--seed0" not in in_process
    assert len(in_process) == 3  # the base, and two learning rates of the other method


def test_results_suffice_to_go_on(world, tmp_path, in_process):
    """Without the working folder, as in a fresh clone of a repository that has the results."""
    settings = experiment(world, subjects=["rex"], methods=["lora"])
    run_benchmark(settings, tmp_path / "first")
    out = shutil.copytree(tmp_path / "first", tmp_path / "out", ignore=shutil.ignore_patterns("work"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    in_process.clear()
    run_benchmark(settings, out)
    assert in_process == []
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run_benchmark(replace(settings, seeds=2), out)
    assert in_process == ["base--rex--seed1", "lora--medium--lr0.001--rex--seed1"]
    assert "2 seeds" in (out / "report.md").read_text()
    assert (out / "sheets" / "rex.webp").read_bytes() == before[out / "sheets" / "rex.webp"]


def test_cells_in_the_place_of_an_earlier_version_are_not_run_again(world, tmp_path, in_process):
    settings = experiment(world, subjects=["rex"])
    run_benchmark(settings, tmp_path / "out")
    (tmp_path / "out" / "work" / "cells").rename(tmp_path / "out" / "cells")
    in_process.clear()
    with pytest.raises(UserError, match=r"an earlier version put its cells there; move them to .*work/cells"):
        run_benchmark(settings, tmp_path / "out")
    with pytest.raises(UserError, match="an earlier version"):
        plan(settings, tmp_path / "out", workers=1)
    assert in_process == []


def test_cells_of_an_earlier_version_s_noise_are_not_added_to(world, finished, tmp_path, in_process):
    comparison = experiment(world, methods=list(METHODS), curve_every=1)
    shutil.copy(finished / "experiment.yaml", tmp_path)
    shutil.copytree(finished / "sheets", tmp_path / "sheets")
    lines = (finished / "results.jsonl").read_text().replace('"noise":', '"formerly":').splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    run_benchmark(comparison, tmp_path)  # nothing is missing
    (tmp_path / "results.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match="earlier version, whose pictures start from other noise, so new ones"):
        run_benchmark(comparison, tmp_path)
    assert in_process == []


def test_a_comparison_in_which_all_diverged_is_no_success(world, tmp_path, in_process):
    rates = {"double_gsoft": [1e30], "lora": [1e30]}
    settings = experiment(world, learning_rates=rates, max_train_steps=4, subjects=["rex"])
    with pytest.raises(UserError, match="every training diverged"):
        run_benchmark(settings, tmp_path)
    assert "Training diverged" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_experiments_are_valid(path):
    assert Experiment.from_dict(read_yaml(path)).methods


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


def test_an_ablation_changes_one_thing(world):
    model = load_model(str(world / "base"))
    layers = adapted_layers(model.unet, [model.text_encoder], True)
    ours = matched("double_gsoft", "medium", layers, True)
    unscaled, dense = (matched(f"double_gsoft_{name}", "medium", layers, True) for name in ("unscaled", "dense"))
    assert unscaled == replace(ours, output_scale=False)
    assert dense == replace(ours, nfactors="dense", nblocks=dense.nblocks, block_size=dense.block_size)
    assert adapts_text_encoder("double_gsoft", True)
    assert not adapts_text_encoder("double_gsoft_denoiser", True)
    assert matched("double_gsoft_denoiser", "medium", layers, False) == replace(ours, text_encoder=False)


def test_ablations_run_beside_the_method_that_they_change(world, tmp_path):
    methods = ["double_gsoft", *ABLATIONS]
    settings = experiment(world, methods=methods, subjects=["rex"])
    for method in ABLATIONS:
        run_cell(settings, Cell(method, "medium", 1e-3, "rex", 0), tmp_path)
    found = {cell.method: result for cell, result in all_results(tmp_path).items()}
    assert found["double_gsoft_dense"]["method"]["nfactors"] == "dense"
    assert found["double_gsoft_unscaled"]["method"]["output_scale"] is False
    assert found["double_gsoft_denoiser"]["training"]["text_encoder_lr"] is None
    assert found["double_gsoft_denoiser"]["full_parameters"] < found["double_gsoft_unscaled"]["full_parameters"]
    assert all("scores" in result for result in found.values())


def test_some_methods_can_be_of_the_medium_size_only(world):
    settings = grid(world, budgets=["small", "medium"], medium_only=["lora"], seeds=1)
    found = {(cell.method, cell.budget) for cell in grid_cells(settings)}
    assert found == {("double_gsoft", "small"), ("double_gsoft", "medium"), ("lora", "medium")}
    assert left_out(replace(settings, medium_only=()), settings) == ["lora at the size small"]
    assert left_out(settings, replace(settings, medium_only=())) == []


def test_a_size_can_have_rates_of_its_own(world):
    settings = grid(world, budgets=["small", "medium"], seeds=1, learning_rates_small={"lora": [2e-3, 4e-3]})
    rates = {(cell.method, cell.budget, cell.learning_rate) for cell in grid_cells(settings) if cell.method == "lora"}
    assert rates == {("lora", "small", 2e-3), ("lora", "small", 4e-3), ("lora", "medium", 1e-3)}
    before = grid(world, budgets=["small", "medium"], seeds=1)
    assert left_out(before, settings) == ["lora small's learning rate 0.001"]
    assert left_out(settings, before) == [
        "lora small's learning rate 0.002",
        "lora small's learning rate 0.004",
    ]


def test_subjects_and_prompts_have_noise_of_their_own():
    given = [("cup", "a cup", 0), ("cup", "a cup", 1), ("cup", "a red cup", 0), ("rex", "a cup", 0)]
    numbers = [number_of(subject, prompt, seed=seed) for subject, prompt, seed in given]
    assert len(set(numbers)) == 4
    assert numbers == [number_of(subject, prompt, seed=seed) for subject, prompt, seed in given]
    assert all(0 <= number < 2**31 for number in numbers)


def test_a_grid_keeps_the_pictures_of_every_step_and_seed(finished_grid):
    folders = [path for path in (finished_grid / "work" / "cells").iterdir() if not path.name.startswith("base")]
    assert {path.name[-5:] for path in folders} == {"seed0", "seed1"}
    assert all(len(list((folder / "step1").glob("*.png"))) == 9 for folder in folders)


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
        ({"methods": ["vera"]}, "methods: vera; choose from double_gsoft"),
        ({"budgets": []}, "budgets: nothing; choose from small"),
        ({"learning_rates": {"lora": []}}, "learning_rates.lora: give one or more"),
        ({"learning_rates": {"lora": [1e-3, 0.0010000001]}}, "learning_rates.lora: 0.001 comes twice"),
        ({"grid": True, "curve_every": 1, "learning_rates_large": {"lora": [1e-3, 1e-3]}}, "lora: 0.001 comes twice"),
        ({"subjects": ["rex", "cup", "rex"]}, "subjects: rex comes twice; give it once"),
        ({"methods": ["lora", "lora"]}, "methods: lora comes twice"),
        ({"budgets": ["medium", "medium"]}, "budgets: medium comes twice"),
        ({"learning_rates": {"lora": ["fast"]}}, "lora: .* is not a list of numbers"),
        ({"seeds": 0}, "--seeds 0: must be more than 0"),
        ({"mixed_precision": "fp8"}, "mixed_precision: fp8; choose from no, "),
        ({"step": 3}, "unknown setting step"),
        ({"num_class_images": 3}, "num_class_images would have no effect"),
        ({"curve_every": 400}, "curve_every would have no effect"),
        ({"grid": True}, "grid: scores several steps of each training; give curve_every"),
        ({"grid": True, "curve_every": 80, "sweep_subjects": 3}, "sweep_subjects would have no effect"),
        ({"methods": ["lora"], "medium_only": ["dora"]}, "medium_only: dora is none of methods"),
        ({"medium_only": ["lora"], "budgets": ["small"]}, "medium_only would have no effect: budgets have no medium"),
        (
            {"methods": ["double_gsoft_denoiser"], "text_encoder": False},
            "double_gsoft_denoiser is what double_gsoft is",
        ),
        (
            {"methods": ["double_gsoft_unscaled"], "output_scale": False},
            "double_gsoft_unscaled is what double_gsoft is",
        ),
        ({"learning_rates_small": {"lora": [1e-3]}}, "learning_rates_small would have no effect: a sweep chooses"),
        (
            {"grid": True, "curve_every": 9, "budgets": ["medium"], "learning_rates_small": {"lora": [1e-3]}},
            "learning_rates_small would have no effect: budgets have no such size",
        ),
        (
            {"grid": True, "curve_every": 80, "learning_rates_large": {"oft": [0]}},
            "oft: learning rates must be above 0",
        ),
        ({"difference_sd": 0}, "difference_sd 0.0: must be more than 0"),
        ({"text_encoder_lr_ratio": 0}, "text_encoder_lr_ratio 0.0: must be more than 0"),
        ({"text_encoder_lr_ratio": 0.1, "text_encoder": False}, "text_encoder_lr_ratio would have no effect"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        Experiment.from_dict(settings)


@pytest.mark.parametrize(("text_encoder", "rate"), [(True, 2e-5), (False, None)])
def test_the_text_encoder_learns_at_its_share_of_the_rate(world, tmp_path, text_encoder, rate):
    comparison = experiment(world, text_encoder_lr_ratio=0.02)
    (subject, *_) = comparison.chosen_subjects()
    training = comparison.training(subject, 0, 1e-3, text_encoder, tmp_path / "run", tmp_path / "class")
    assert (training.learning_rate, training.text_encoder_lr) == (1e-3, rate)


def test_unknown_subjects_are_named(world):
    with pytest.raises(UserError, match=r"subjects: max is not in .*; there are cup, rex"):
        experiment(world, subjects=["max"]).chosen_subjects()
