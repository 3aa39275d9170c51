"""What the paper's comparison is estimated to cost."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import paper_cost
from eval.experiment import Experiment


def test_operations_are_counted_on_the_published_networks():
    counts = paper_cost.operations()
    assert 0.6e12 < counts["prediction"] < 0.9e12  # 866 million weights at 64 x 64 latents
    assert 2e12 < counts["decoding"] < 3e12
    assert 2 < counts["training"] / counts["prediction"] < 2.5  # the base is frozen; 3, if all of it trained


def test_what_the_comparison_consists_of():
    experiment = Experiment(
        subjects=("a", "b"),
        methods=("lora", "full"),
        budgets=("small", "medium"),
        seeds=2,
        sweep_subjects=1,
        max_train_steps=10,
        train_batch_size=3,
        curve_every=5,
        max_prompts=2,
        images_per_prompt=1,
        base_images=1,
        class_images=1,
        unrelated_images=1,
    )
    found = paper_cost.amount(experiment)
    # 4 cells of the base; 4 rates of each method on one subject; 3 rows on two subjects and seeds, 2 of these swept
    assert found["cells"] == 4 + 8 + (12 - 2)
    assert found["steps"] == (8 + 10) * 10
    assert found["photos"] == found["steps"] * 3
    first_seed = 8 + (6 - 2)  # these are scored half-way as well
    assert found["pictures"] == (4 + 18 + first_seed) * (2 + 1 + 1 + 4)


def test_the_committed_estimate_is_what_the_command_finds(tmp_path, monkeypatch):
    out = tmp_path / "cost.json"
    monkeypatch.setattr("sys.argv", ["paper_cost", "--out", str(out)])
    paper_cost.main()
    committed = json.loads(Path("benchmarks/results/paper_cost.json").read_text())
    assert json.loads(out.read_text()) == committed
    low, high = committed["estimates"]["A100"]["gpu_hours"]
    assert high == 3 * low or abs(high - 3 * low) <= 2
