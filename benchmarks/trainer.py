"""What the training loop adds to a step: `train` on the miniature base, against bare steps of the same model.

python -m benchmarks.trainer --out benchmarks/results/trainer.json

The bare step is forward, backward and optimizer on one batch of latents that never changes: no photos, noise, bar,
clipping, trackers. Every repetition takes both, one after the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch

from benchmarks.measure import Records, file_to_write, median, table
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.foundation.memory import keep_freed_memory
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training.optimizer import make_optimizer
from gsoft_diffusion.training.predictor import Predictor
from gsoft_diffusion.training.preparation import with_model_defaults
from gsoft_diffusion.training.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    records = Records(args.out, {"steps": args.steps})
    for repetition in range(args.repetitions):
        if not records.has(repetition=repetition):
            records.add(repetition=repetition, **measure(args.steps))
    print(report(records.records))


def measure(steps: int) -> dict[str, float]:
    """Seconds of a step in the training loop, and of a bare one.

    Raises KeyboardInterrupt if a signal ends the training.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            "data/subjects/teddy_bear",
            class_word="bear",
            output_dir=f"{folder}/run",
            max_train_steps=steps,
            num_validation_images=0,
        )
        result = train(config)
    if result.interrupted:
        raise KeyboardInterrupt
    return {"trained": result.seconds / steps, "bare": bare_step(config, steps)}


def bare_step(config: TrainingConfig, steps: int) -> float:
    """Mean seconds of as many steps of what `train` would train with these settings."""
    model: Any = load_model(config.pretrained_model_name_or_path)
    config = with_model_defaults(config.resolved(), model)
    adapter = inject(config.adapter, model.denoiser, model.text_encoders)
    denoiser = Predictor(model, adapter, [config.concepts[0].instance_prompt or ""]).train()
    optimizer = make_optimizer(config, adapter)
    keep_freed_memory()
    size = config.train_batch_size
    latents = torch.randn(size, *model.latent_shape(model.resolution))
    timesteps, prompt_of = torch.randint(1000, (size,)), torch.zeros(size, dtype=torch.long)

    def step() -> None:
        denoiser(latents, timesteps, prompt_of[:1], prompt_of, torch.zeros(size, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


def report(records: list[dict[str, Any]]) -> str:
    rows = [
        [title, f"{median(r[name] for r in records):.3f}", f"{median(r[name] / r['bare'] for r in records):.3f}"]
        for name, title in (("trained", "in the training loop"), ("bare", "bare"))
    ]
    return f"{table(['', 'step, s', '/ bare'], rows)}\n\n{len(records)} repetitions."


if __name__ == "__main__":
    main()
