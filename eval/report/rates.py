"""Which learning rate each method is compared at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from eval.cells import Cell
from eval.experiment import Experiment
from eval.report.lines import sweep_lines
from eval.results import RESULTS, Results
from gsoft_diffusion.foundation.errors import UserError


def choose_learning_rates(experiment: Experiment, results: Results) -> dict[str, float]:
    """For each method the learning rate of the best balance in the sweep, or its only one.

    experiment: says which rates were tried. results: of the sweep and the base model. Raises UserError if cells are
    missing or do not compare, or if a method diverged at all of its rates.
    """
    check_comparable(list(results.values()))
    chosen = {}
    for method, by_rate in sweep_lines(experiment, results).items():
        rates = getattr(experiment.learning_rates, method)
        balances = {rate: line.interval("balance") for rate, line in by_rate.items()}
        good = {rate: interval.mean for rate, interval in balances.items() if interval}
        if len(rates) > 1 and not good:
            raise UserError(f"learning_rates.{method}: training diverged at all of {', '.join(map(str, rates))}")
        chosen[method] = max(good, key=lambda rate: good[rate]) if len(rates) > 1 else rates[0]
    return chosen


def check_comparable(results: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError naming the cells with another base model, other encoders, photos or prompts than the rest."""
    _check_same(results, "encoders", "encoders")
    models = [{**result, "base_model": result["base_model"]["fingerprint"]} for result in results]
    _check_same(models, "base_model", "base model")
    noise = [{**result, "noise": result.get("noise", "by the picture's number")} for result in results]  # as before
    _check_same(noise, "noise", "noise")
    for subject in {result["cell"]["subject"] for result in results}:
        of_subject = [result for result in results if result["cell"]["subject"] == subject]
        _check_same(of_subject, "photos_hash", f"photos of {subject}")
        for is_base in (True, False):  # the base model is asked without the unique token
            drawn = [
                {
                    **result,
                    "prompts": list(dict.fromkeys((each["kind"], each["prompt"]) for each in result["pictures"])),
                }
                for result in of_subject
                if "pictures" in result and (result["cell"]["method"] == "base") == is_base
            ]
            _check_same(drawn, "prompts", f"prompts for {subject}")


def _check_same(results: Sequence[Mapping[str, Any]], fact: str, what: str) -> None:
    found = [(Cell(**result["cell"]).id, result[fact]) for result in results if fact in result]
    if not found:
        return
    usual = Counter(str(value) for _, value in found).most_common(1)
    odd = [name for name, value in found if str(value) != usual[0][0]]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(
            f"{RESULTS}: {odd[0]}{more}: made with other {what} than the rest, so they do not compare; delete "
            "their lines there and their folders in work/cells, and run eval.benchmark again"
        )
