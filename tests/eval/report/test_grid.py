"""From the results of a grid to fronts and held-out lines."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from tiny_eval import grid

from eval.cells import Cell
from eval.report.front_tables import area_rows, chosen_rows, prompt_rows, setting_rows, verdict_text
from eval.report.grid import (
    Grid,
    Group,
    Setting,
    ablation_lines,
    compare_fronts,
    held_out_lines,
    knees,
    pseudo_leads,
    read_grid,
    seed_averages,
)
from eval.report.intervals import detectable_by, detectable_difference
from eval.report.lines import references
from eval.report.plots import front_plot
from eval.results import read_results, result_at
from gsoft_diffusion import UserError


@pytest.fixture
def settings(world):
    return grid(world)


def test_every_cell_of_a_grid_is_scored_at_every_step_with_all_pictures(finished_grid):
    results = {cell: result for cell, result in read_results(finished_grid).items() if cell.method != "base"}
    assert len(results) == 2 * 2 * 3  # subjects, seeds, rates of both methods
    for result in results.values():
        assert [point["step"] for point in result["curve"]] == [1, 2]
        before = result_at(result, 1)
        assert len(before["pictures"]) == len(result["pictures"])
        context = [picture["dino"] for picture in before["pictures"] if picture["kind"] == "context"]
        assert np.mean(context) == pytest.approx(before["scores"]["dino"], abs=1e-5)
        assert before["scores"]["dino"] != result["scores"]["dino"]


def test_the_grid_holds_the_scores_of_each_prompt(settings, finished_grid):
    results = read_results(finished_grid)
    found = read_grid(settings, results)
    assert found.subjects == ["cup", "rex"]
    assert found.ends.shape == (2, 2, 2, 2, 2)  # base and photos; subject and prompt; subjects, seeds, prompts
    ours, lora = found.groups
    assert ours.settings == [Setting(1e-3, 1), Setting(1e-3, 2), Setting(1e-2, 1), Setting(1e-2, 2)]
    assert (lora.method, lora.budget, lora.scores.shape) == ("lora", "medium", (2, 2, 2, 2, 2))
    result = results[Cell("double_gsoft", "medium", 1e-2, "rex", 1)]
    context = [picture for picture in result["pictures"] if picture["kind"] == "context"]
    assert ours.scores[3, :, 1, 1].tolist() == [[p["dino"] for p in context], [p["clip_t"] for p in context]]
    base = results[Cell("base", None, None, "cup", 1)]
    assert found.ends[0, 0, 0, 1].mean() == pytest.approx(base["scores"]["dino"])
    assert found.ends[1, 1, 0, 1].mean() == pytest.approx(base["photos"]["clip_t"])
    assert found.ends[1, 1, 0, 1].tolist() == list(base["photos"]["clip_t_by_caption"].values())
    base_dino = [results[Cell("base", None, None, "cup", seed)]["scores"]["dino"] for seed in range(2)]
    assert seed_averages(references(results.values()))["cup", 0][0][0] == pytest.approx(np.mean(base_dino))


def test_a_grid_that_is_not_complete_has_no_report(settings, finished_grid):
    results = read_results(finished_grid)
    del results[Cell("lora", "medium", 1e-3, "rex", 1)]
    with pytest.raises(
        UserError, match=r"results\.jsonl lacks lora--medium--lr0\.001--rex--seed1; run eval\.benchmark"
    ):
        read_grid(settings, results)


def test_held_out_lines_take_each_subject_at_the_others_best_setting(settings, finished_grid):
    results = read_results(finished_grid)
    found = read_grid(settings, results)
    ours = found.groups[0]
    ours.balances[:] = [[[0.1] * 2, [0.9] * 2], [[0.2] * 2, [0.3] * 2], [[0.9] * 2, [0.4] * 2], [[0.3] * 2, [0.1] * 2]]
    lines = held_out_lines(settings, results, found)
    assert [line.title for line in lines] == ["Real photos", "Base model", "Double GSOFT medium", "LoRA medium"]
    chosen = chosen_rows(lines, found)[0]
    assert (chosen["cup"], chosen["rex"]) == ("0.001, step 1", "0.01, step 1")
    assert [row["at the edge of its rates"] for row in chosen_rows(lines, found)] == ["2 of 2", ""]  # LoRA has one rate
    cup = results[Cell("double_gsoft", "medium", 1e-3, "cup", 1)]
    assert lines[2].scores["dino"]["cup"][1] == cup["curve"][0]["dino"]
    assert all(len(seeds) == 2 for seeds in lines[3].scores["drift"].values())


def test_a_method_that_diverged_everywhere_has_a_line_and_no_front(settings, finished_grid):
    results = read_results(finished_grid)
    for cell, result in results.items():
        if cell.method == "lora":
            results[cell] = {
                name: value for name, value in result.items() if name not in ("scores", "pictures", "curve")
            }
            results[cell]["diverged"] = "the loss is not finite"
    found = read_grid(settings, results)
    lines = held_out_lines(settings, results, found)
    assert lines[-1].scores["dino"] == {}
    fronts = compare_fronts(found, resamples=50)
    assert area_rows(fronts)[1]["subject (DINO) from – to"] == "diverged"
    assert {row["CLIP-T"] for row in setting_rows(fronts, found)[4:]} == {"diverged"}
    assert chosen_rows(lines, found)[1]["rex"] == "diverged"
    assert "diverged" in prompt_rows(fronts)[1].values()


def test_ablations_are_shown_at_the_knee_of_our_front(settings, finished_grid):
    results = read_results(finished_grid)
    for cell, result in list(results.items()):
        if cell.method == "double_gsoft":
            other = replace(cell, method="gsoft")
            results[other] = result | {"cell": asdict(other)}
    rates = replace(settings.learning_rates, gsoft=settings.learning_rates.double_gsoft)
    settings = replace(settings, methods=("double_gsoft", "gsoft", "lora"), learning_rates=rates)
    found = read_grid(settings, results)
    found.groups[0].balances[:] = [[[0.1] * 2] * 2, [[0.9] * 2, [0.1] * 2], [[0.1] * 2, [0.8] * 2], [[0.3] * 2] * 2]
    assert knees(found) == {"cup": Setting(1e-2, 1), "rex": Setting(1e-3, 2)}
    ours, gsoft = ablation_lines(results, found)
    assert (ours.method, gsoft.method) == ("double_gsoft", "gsoft")
    assert gsoft.scores["dino"] == ours.scores["dino"]
    assert ours.scores["dino"]["rex"][1] == results[Cell("double_gsoft", "medium", 1e-3, "rex", 1)]["scores"]["dino"]
    without = replace(settings, methods=("double_gsoft", "lora"))
    assert ablation_lines(results, read_grid(without, results)) == []


def test_subjects_that_the_base_model_draws_already_choose_nothing(settings, finished_grid):
    results = read_results(finished_grid)
    for cell, result in list(results.items()):
        if cell.method == "base":
            result["photos"]["dino"] = result["scores"]["dino"] + {"cup": 0.3, "rex": 0.02}[cell.subject]
        if cell.subject == "cup":
            other = replace(cell, subject="tin")
            results[other] = result | {"cell": asdict(other)}
    three = replace(settings, subjects=("cup", "rex", "tin"))
    found = read_grid(three, results)
    assert found.choosing == ["cup", "tin"]
    lines = held_out_lines(three, results, found)
    assert lines[2].scores["balance"].keys() == {"cup", "tin"}
    assert lines[2].scores["dino"].keys() == {"cup", "rex", "tin"}
    text = verdict_text(compare_fronts(found, 50), lines, found, 0.1)
    assert "almost as like the photos of rex as these are to each other" in text
    assert read_grid(settings, results).choosing == ["cup", "rex"]  # one alone could not be held out


# Numbers made by hand


def group(method, points, noise=0.0, subjects=4, seeds=2, prompts=3):
    """A method whose settings score these points, with subjects that differ."""
    spread = noise * np.linspace(-1, 1, subjects)[:, None, None] * np.ones((1, seeds, prompts))
    scores = np.array([[np.full_like(spread, value) + spread for value in point] for point in points])
    balances = scores.mean(axis=(1, 4))
    return Group(method, "medium", [Setting(1e-3, step) for step in range(len(points))], scores, balances)


def by_hand(ours, other, noise=0.0, subjects=4, seeds=2, methods=("lora",)):
    groups = [group(name, other, 0.0, subjects, seeds) for name in methods]
    groups.insert(0, group("double_gsoft", ours, noise, subjects, seeds))
    ends = group("base", [(0.0, 1.0), (1.0, 0.0)], 0.0, subjects, seeds).scores
    names = [f"s{number}" for number in range(subjects)]
    references = {(name, seed): ((0.0, 1.0), (1.0, 0.0)) for name in names for seed in range(seeds)}
    return Grid(names, names, seeds, ends, references, groups)


def test_a_method_that_is_better_for_all_is_ahead():
    grid = by_hand([(0.2, 0.9), (0.8, 0.5)], [(0.2, 0.7), (0.6, 0.3)])
    ours, lora = compare_fronts(grid).methods
    assert ours.differences is None
    assert ours.lead is None
    assert ours.estimates[0].interval.mean == pytest.approx(0.2 * 0.95 + 0.6 * 0.7)
    assert lora.differences[0].interval.mean == pytest.approx(0.61 - 0.6 * 0.65)
    assert lora.lead.interval.mean == pytest.approx(0.1778, abs=1e-4)
    assert lora.shared == pytest.approx(0.6)
    text = verdict_text(compare_fronts(grid), [], grid, 0.1)
    assert "What decides" not in text  # BOFT is not there
    assert "At the size medium, by lead Double GSOFT is ahead of LoRA (+0.178 [" in text
    assert "By area it is ahead of LoRA (+0.220 [" in text
    assert "By balance" not in text  # without held-out lines
    least = detectable_difference(0.1, 4, 2)
    assert f"over 4 subjects that the settings assume, 0.1, it would be {least:.3f}." in text
    found = detectable_by(lora.lead.half_width, 4)
    assert f"By that, a lead of {found:.3f} would be found with 80% power." in text


@pytest.mark.parametrize(
    ("ours", "result"),
    [
        (
            [(0.2, 0.9), (0.8, 0.5)],
            "ahead of LoRA (+0.178 [+0.178, +0.178]), BOFT (+0.178 [+0.178, +0.178]). So it wins",
        ),
        (
            [(0.2, 0.6), (0.8, -0.4)],
            "behind LoRA (-0.175 [-0.175, -0.175]), BOFT (-0.175 [-0.175, -0.175]). So it loses",
        ),
        ([(0.2, 0.7), (0.6, 0.3)], "not decided against LoRA (+0.000 [+0.000, +0.000]), BOFT"),
        ([(0.4, 0.95)], "not decided against LoRA (+0.208 [+0.208, +0.208]), BOFT"),  # over less than half of the way
    ],
)
def test_who_wins_is_decided_by_two_leads(ours, result):
    grid = by_hand(ours, [(0.2, 0.7), (0.6, 0.3)], methods=("lora", "boft"))
    text = verdict_text(compare_fronts(grid), [], grid, 0.1)
    assert "the leads over LoRA and BOFT at the size medium. Double GSOFT wins if it is ahead of all of them." in text
    assert f"By lead it is {result}" in text


def test_we_are_not_ahead_of_a_method_with_fewer_settings():
    """Further settings can only raise a front. A method that leads ours with fewer of them does lead."""
    high, low = [(0.2, 0.9), (0.8, 0.5), (0.8, 0.4)], [(0.2, 0.7), (0.6, 0.3)]
    fronts = compare_fronts(grid := by_hand(high, low))
    text = verdict_text(fronts, [], grid, 0.1)
    assert "by lead Double GSOFT is above, but with more settings than LoRA (+0.178 [" in text
    assert "By area it is above, but with more settings than LoRA (+0.220 [" in text
    assert [row["verdict"] for row in area_rows(fronts)] == ["", "fewer settings"]
    for theirs in ([(0.2, 0.6), (0.8, -0.4)], [(0.2, 0.6), (0.8, -0.4), (0.8, -0.5)]):
        ours = by_hand(theirs, low)
        assert "by lead Double GSOFT is behind LoRA" in verdict_text(compare_fronts(ours), [], ours, 0.1)


def test_differences_that_depend_on_the_subject_are_not_decided():
    grid = by_hand([(0.2, 0.7), (0.8, 0.3)], [(0.2, 0.7), (0.8, 0.3)], noise=0.3)
    fronts = compare_fronts(grid)
    assert "not decided against LoRA" in verdict_text(fronts, [], grid, 0.1)
    difference = fronts.methods[1].differences[0]
    assert difference.interval.low < 0 < difference.interval.high


def test_what_all_subjects_share_cancels_in_a_paired_difference():
    """Subjects differ by far more than methods do, and in the same way for both."""
    grid = by_hand([(0.2, 0.75), (0.8, 0.35)], [(0.2, 0.7), (0.8, 0.3)])
    for each in grid.groups:
        each.scores[:, 1] += np.array([-0.2, -0.1, 0.1, 0.2])[:, None, None]
    ours, lora = compare_fronts(grid).methods
    assert lora.differences[0].half_width < 0.02  # the first line, from the base model, is not as steep for all
    assert lora.lead.interval.low > 0
    assert ours.estimates[0].half_width > 0.1


def test_subjects_that_are_alike_contribute_alike_to_a_lead():
    grid = by_hand([(0.2, 0.9), (0.8, 0.5)], [(0.2, 0.7), (0.6, 0.3)])
    (values,) = pseudo_leads(grid)
    assert values == pytest.approx([0.1778] * 4, abs=1e-4)


def test_a_missing_lead_has_its_reason():
    grid = by_hand([(0.2, 0.9), (0.8, 0.5)], [(-0.1, 0.7)])
    assert (
        "no value: a method has no more of the subject than the base" in area_rows(compare_fronts(grid, 20))[1].values()
    )
    gone = by_hand([(0.2, 0.9), (0.8, 0.5)], [(np.nan, np.nan)])
    assert area_rows(compare_fronts(gone, 20))[1]["lead of Double GSOFT"] == "diverged"


def test_levels_that_a_front_does_not_reach_are_said_to_be():
    grid = by_hand([(0.3, 0.7), (0.8, 0.3)], [(0.1, 0.8), (0.6, 0.4)])
    ours, lora = prompt_rows(compare_fronts(grid))
    assert ours["at DINO 0.250"].startswith("0.781 [")  # between the base model and the last setting
    assert lora["at DINO 0.750"] == "not reached: ends at 0.600"
    assert lora["at DINO 0.500"].startswith("0.500 [")
    assert lora["Double GSOFT − this, at DINO 0.500"].startswith("+0.062 [")
    assert lora["Double GSOFT − this, at DINO 0.750"] == ""


@pytest.mark.parametrize(("subjects", "seeds"), [(1, 3), (4, 1)])
def test_one_subject_or_one_seed_gives_no_verdict(subjects, seeds):
    grid = by_hand([(0.2, 0.9), (0.8, 0.5)], [(0.2, 0.7), (0.6, 0.3)], subjects=subjects, seeds=seeds)
    fronts = compare_fronts(grid, resamples=50)
    (_, lora) = area_rows(fronts)
    assert lora["area ↑"].endswith("[–]")
    assert lora["verdict"] == "no interval"
    assert all(estimate.half_width is None for each in fronts.methods for estimate in each.estimates)
    assert not math.isnan(fronts.methods[0].estimates[0].interval.mean)


def test_the_plot_names_methods_of_one_size_too():
    """SVG keeps its texts as comments."""
    grid = by_hand([(0.2, 0.7), (0.8, 0.3)], [(0.2, 0.7), (0.8, 0.3)])
    large = replace(group("double_gsoft", [(0.3, 0.6)]), budget="large")
    svg = front_plot(compare_fronts(replace(grid, groups=[*grid.groups, large]), resamples=20), miniature=False)
    assert all(
        f"<!-- {name} -->" in svg for name in ("medium", "large", "LoRA", "Double GSOFT", "photos", "base model")
    )
