"""An estimate of what the paper's comparison costs, in GPU hours by class of GPU. Nothing of it is measured.

    python -m benchmarks.paper_cost

Operations are counted on Stable Diffusion 2's networks without weights. A GPU is assumed to do between a tenth and
three tenths of the most that its maker states. Loading, scoring and the methods' own operations are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import file_to_write, table
from eval.baselines import adapted_layers
from eval.cell_pictures import pictures_of
from eval.cells import base_cells, main_cells, scorings, sweep_cells
from eval.experiment import Experiment
from eval.prompts import prompts_for
from eval.subjects import Subject
from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.config.settings import read_yaml

SUBJECTS = 30  # of the public DreamBooth data set
PEAK = {  # TFLOP/s in half precision without sparsity, as NVIDIA states them
    "T4": 65,
    "L4": 121,
    "V100": 125,
    "A10": 125,
    "RTX 4090": 165,
    "A100": 312,
    "H100 SXM": 989,
}
SHARES = (0.3, 0.1)  # of the peak: assumed, for the lowest estimate and the highest
# As unet/config.json and vae/config.json of stabilityai/stable-diffusion-2-base.
UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
GUIDED = 2  # predictions a sampling step: with the prompt and without


def operations() -> dict[str, int]:
    """Floating-point operations at 512 px: of one prediction, of one photo in a training step, of decoding a picture.

    In training the gradients of all adapted weights are counted, which is the most that a method needs of them.
    """
    counts = {}
    with torch.device("meta"):
        latent = torch.empty(1, 4, 64, 64)
        unet = UNet2DConditionModel(**UNET).requires_grad_(False)
        for layer in adapted_layers(unet, [], text_encoder=False).values():
            layer.weight.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            made = unet(latent, torch.empty(1), torch.empty(1, 77, UNET["cross_attention_dim"])).sample
            counts["prediction"] = counter.get_total_flops()
            made.sum().backward()
        counts["training"] = counter.get_total_flops()
    with torch.device("meta"), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            AutoencoderKL(**VAE).decode(latent)
        counts["decoding"] = counter.get_total_flops()
    return counts


def amount(experiment: Experiment) -> dict[str, int]:
    """What the comparison consists of: cells, optimizer steps, photos seen in these, and pictures drawn."""
    subject = Subject("a", "dog", True, Path())
    prompts = prompts_for(subject, experiment.unique_token, experiment.prompts, experiment.max_prompts)
    pictures = sum(pictures_of(experiment, prompt.kind) for prompt in prompts)
    rates = {method: getattr(experiment.learning_rates, method)[0] for method in experiment.methods}
    sweep = sweep_cells(experiment)
    # The chosen rates are among those of the sweep, whichever they are.
    cells = list(dict.fromkeys([*base_cells(experiment), *sweep, *main_cells(experiment, rates)]))
    trained = [cell for cell in cells if cell.method != "base"]
    drawn = sum(pictures * scorings(experiment, cell) for cell in cells)
    steps = len(trained) * experiment.max_train_steps
    return {
        "cells": len(cells),
        "steps": steps,
        "photos": steps * experiment.train_batch_size,
        "pictures": drawn,
    }


def estimate(experiment: Experiment, classes: Iterable[str] = tuple(PEAK)) -> dict[str, Any]:
    """All that the tables show."""
    counts, work = operations(), amount(experiment)
    prediction, steps_drawn = counts["prediction"], experiment.sampler.num_inference_steps or 50
    step = experiment.train_batch_size * counts["training"]
    picture = steps_drawn * GUIDED * prediction + counts["decoding"]
    total = work["steps"] * step + work["pictures"] * picture
    by_class = {}
    for name in classes:
        speeds = [PEAK[name] * 1e12 * share for share in SHARES]
        by_class[name] = {
            "seconds_a_step": [round(step / speed, 3) for speed in speeds],
            "seconds_a_picture": [round(picture / speed, 3) for speed in speeds],
            "gpu_hours": [round(total / speed / 3600) for speed in speeds],
        }
    return {"operations": counts, "amount": work, "shares_of_peak": SHARES, "estimates": by_class}


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=expanded_path, default=Path("eval/experiments/paper.yaml"))
    parser.add_argument("--out", type=file_to_write, default=Path("benchmarks/results/paper_cost.json"))
    args = parser.parse_args()
    names = {"subjects": [f"subject {number}" for number in range(1, SUBJECTS + 1)]}
    found = estimate(Experiment.from_dict(read_yaml(args.experiment) | names))
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(", ".join(f"{value:,} {name}" for name, value in found["amount"].items()))
    rows = [
        [
            name,
            f"{PEAK[name]}",
            *("{:.2f} to {:.2f}".format(*row[column]) for column in ("seconds_a_step", "seconds_a_picture")),
            "{:,} to {:,}".format(*row["gpu_hours"]),
        ]
        for name, row in found["estimates"].items()
    ]
    print(table(["GPU", "TFLOP/s stated", "seconds a step", "seconds a picture", "GPU hours in all"], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
