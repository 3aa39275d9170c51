"""The report's plots."""

from __future__ import annotations

from tiny_eval import experiment

from eval.methods import METHODS
from eval.report.lines import SCORES, Line, sweep_lines, table_lines
from eval.report.plots import curve_plot, pareto_plot, sweep_plot
from eval.report.rates import choose_learning_rates
from eval.results import read_results


def lines(*values):
    scores = {name: {subject: [value, value] for subject, value in enumerate(values)} for name in SCORES}
    return [Line("lora", "medium", 1e-3, [], scores)]


def test_a_plot_of_one_subject_says_so():
    """SVG keeps its texts as comments."""
    assert "one subject or one seed, so no intervals" in pareto_plot(lines(0.5), miniature=False)
    assert "no intervals" not in pareto_plot(lines(0.4, 0.6), miniature=False)


def test_plots_name_the_miniature_encoders():
    assert "CLIP-T (miniature encoders)" in pareto_plot(lines(0.5), miniature=True)
    assert "miniature" not in pareto_plot(lines(0.5), miniature=False)


def test_what_was_not_recorded_has_no_plot():
    assert curve_plot(lines(0.5), miniature=False) is None
    assert sweep_plot({"lora": {}}, {"lora": 1e-3}, miniature=False) is None


def test_plots_are_the_same_again(world, finished):
    settings = experiment(world, methods=list(METHODS), curve_every=1)
    results = read_results(finished)
    rates = choose_learning_rates(settings, results)
    table, swept = table_lines(settings, results, rates), sweep_lines(settings, results)
    assert pareto_plot(table, True).strip() == (finished / "pareto.svg").read_text().strip()
    assert sweep_plot(swept, rates, True).strip() == (finished / "learning_rates.svg").read_text().strip()
    assert curve_plot(table, True).strip() == (finished / "curves.svg").read_text().strip()
