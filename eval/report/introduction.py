"""What the report says before its tables: what was compared, and how it was scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from eval.cells import budgets_of
from eval.experiment import Experiment
from eval.report.lines import Line

MIXED = "Cells ran on several machines or with several versions, so minutes and peak memory do not compare."
MINIATURE = (
    "Scored with the bundled miniature encoders: these numbers compare with each other only, "
    "not with any that the field's CLIP or DINO gives."
)


def introduction(
    experiment: Experiment, lines: Sequence[Line], results: Sequence[Mapping[str, Any]], encoders: Mapping[str, Any]
) -> str:
    """What was compared and how it was scored, as Markdown.

    experiment: the settings. lines: of the table. results: of the cells in these lines, one or more. encoders: what
    scored them, as each result says under `encoders`.
    """
    subjects = sorted({result["cell"]["subject"] for result in results})
    machines = Counter(_machine(result) for result in results)
    described = [
        f"{e['kind']} {e['name']}, weights {e['weights']}, {e['preprocessing']['size']} px, by {e['library']}"
        for e in encoders.values()
    ]
    miniature = encoders["clip"]["miniature"] or encoders["dino"]["miniature"]
    diverged = [line.title for line in lines if any("diverged" in r for r in line.results)]
    return "\n\n".join(
        [
            "# Comparison of fine-tuning methods",
            *([f"**{MINIATURE}**"] if miniature else []),
            f"Base model {results[0]['base_model']['name']}; {len(subjects)} subjects ({', '.join(subjects)}), "
            f"{experiment.seeds} seeds, {experiment.max_train_steps} steps at batch {experiment.train_batch_size}, "
            f"the same for all methods; {_choices(experiment)}",
            "Scores are averaged within each subject first; in brackets "
            f"{_intervals(experiment, subjects)}. "
            "CLIP-I, DINO and CLIP-T over all context prompts are DreamBooth's protocol; CLIP-I on the base "
            "prompt with CLIP-T on context prompts is the GSOFT paper's. Captions for CLIP-T are the prompts "
            f"{results[0]['captions']}. Balance is the harmonic mean of how far DINO has come from the base model's "
            "to the real photos' and how much of the base model's CLIP-T is left above that of the photos. Nearest "
            "photo is DINO with the most similar training photo; near 1 it was copied. PRES is DINO of pictures of "
            "the class with the subject's photos, DIV 1 − DINO between pictures of one prompt, drift 1 − CLIP "
            "similarity with the base model's picture for unrelated prompts.",
            f"Encoders: {'; '.join(described)}.",
            *([f"Training diverged, so there is no score: {', '.join(diverged)}."] if diverged else []),
            *(f"{_cells(count, len(machines))}{machine}." for machine, count in machines.most_common()),
            *([f"**{MIXED}**"] if len(machines) > 1 else []),
        ]
    )


def _machine(result: Mapping[str, Any]) -> str:
    """Where a cell ran, and with which versions."""
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    return f"{result['device']}, {threads} a cell; {versions}"


def _cells(count: int, kinds: int) -> str:
    return "" if kinds == 1 else f"{count} cells: "


def _choices(experiment: Experiment) -> str:
    """Where learning rates and steps come from."""
    if experiment.grid:
        sizes = [(method, budget) for method in experiment.methods for budget in budgets_of(method, experiment)]
        counts = sorted({len(experiment.rates_of(*size)) for size in sizes})
        steps = ", ".join(map(str, experiment.recorded_steps()))
        return (
            f"every method at every size has {' or '.join(map(str, counts))} learning rates on all subjects and seeds, "
            f"each scored after {steps} steps."
        )
    tried = [len(getattr(experiment.learning_rates, method)) for method in experiment.methods]
    if max(tried) == 1:
        return "learning rates as given."
    swept = experiment.subject_names()[: experiment.sweep_subjects]
    numbers = " or ".join(map(str, sorted(set(tried))))
    return (
        f"every method's learning rate is the best of {numbers}, by the balance at the size {experiment.sweep_budget} "
        f"on {', '.join(swept)} with seed 0, for all sizes. These cells are part of the averages as well, so scores of "
        "methods with more rates are a little too high."
    )


def _intervals(experiment: Experiment, subjects: Sequence[str]) -> str:
    """What stands in the brackets of the tables."""
    if len(subjects) < 2 or experiment.seeds < 2:
        return "– and no interval, since one subject or one seed says nothing of how scores spread"
    over = "subjects, seeds and, for fronts, prompts" if experiment.grid else "subjects and seeds"
    return f"95 % intervals of a hierarchical bootstrap over {over}, paired between methods (eval/report/intervals.py)"
