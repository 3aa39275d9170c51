"""What both kinds of prior preservation, and an average of the adapter over its steps, are good for.

python -m benchmarks.keeping --out benchmarks/results/keeping.json

Three adapters are trained for each subject: without prior preservation, with class images, and with the base model's
predictions. The first is averaged beside its training. Their pictures are drawn and scored, which is timed as well.
Seconds are the processor's, so other programs may run meanwhile; measurements are kept as they come.
`benchmarks.choosing` measures how a run's best step is chosen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.training_utils import EMAModel

from benchmarks.measure import Records, file_to_write, table
from eval.prompts import prompts_for
from eval.subjects import BUNDLED, Subject, read_subjects
from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config import SamplerConfig, TrainingConfig
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.judge import Judge, encoders_for
from gsoft_diffusion.scoring.pictures import embed
from gsoft_diffusion.training import subjects as subjects_module
from gsoft_diffusion.training.step import TrainingStep
from gsoft_diffusion.training.train import train

PRIORS: dict[str, dict[str, Any]] = {
    "none": {},
    "class_images": {"with_prior_preservation": True},
    "base_prediction": {"with_prior_preservation": True, "prior_target": "base_prediction"},
}
DECAYS = (0.9, 0.98)
TOKEN = "sks"
SAMPLER = SamplerConfig(num_inference_steps=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=["teddy_bear", "blue_car", "running_shoe"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--class_images", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=16, help="scored, of the subject and of its class each")
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "subjects", "seeds")}
    records = Records(args.out, settings)
    known = {subject.name: subject for subject in read_subjects(BUNDLED)}
    for name in args.subjects:
        for seed in range(args.seeds):
            for prior in PRIORS:
                if not records.has(subject=name, seed=seed, prior=prior):
                    records.add(subject=name, seed=seed, prior=prior, **measure(args, known[name], seed, prior))
    print(report(records.records))


def measure(args: Any, subject: Subject, seed: int, prior: str) -> dict[str, Any]:
    """Train one adapter and score it. Raises KeyboardInterrupt if a signal ends the training."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            str(subject.folder),
            class_word=subject.class_word,
            unique_token=TOKEN,
            output_dir=f"{folder}/run",
            max_train_steps=args.steps,
            train_batch_size=args.batch_size,
            seed=seed,
            report_to="none",
            num_validation_images=0,
            checkpointing_steps=0,
            sampler=SAMPLER,
            **PRIORS[prior],
        )
        if prior == "class_images":
            config = replace(config, num_class_images=args.class_images)
        with watched() as seen:
            result = train(config)
        if result.interrupted:
            raise KeyboardInterrupt
        scorer = Scorer(args.pictures, subject)
        found: dict[str, Any] = {"step_seconds": statistics.median(seen.steps), "class_seconds": seen.class_images}
        found |= scorer.of(read_adapter(result.adapter).tensors, result.adapter)
        if prior == "none":
            found["averages"] = {str(decay): scorer.of(each, result.adapter) for decay, each in seen.averages.items()}
        return found | {"drawing_seconds": scorer.drawing, "scoring_seconds": scorer.scoring}


class Watched:
    """What is seen of a run: seconds of its steps and of its class images, and averages of its adapter at the end."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.class_images = 0.0
        self.averages: dict[float, dict[str, torch.Tensor]] = {}


@contextmanager
def watched() -> Iterator[Watched]:
    """Inside the block a run is watched."""
    seen = Watched()
    averages: dict[float, EMAModel] = {}
    backward, update, class_images = TrainingStep.backward, TrainingStep.update, subjects_module.ensure_class_images
    began = [0.0]

    def first(step: TrainingStep, *arguments: Any) -> Any:
        began[0] = time.process_time()
        return backward(step, *arguments)

    def last(step: TrainingStep, *arguments: Any) -> None:
        update(step, *arguments)
        seen.steps.append(time.process_time() - began[0])
        names, parameters = zip(*step.state.adapter.named_parameters(), strict=True)
        if not averages:
            averages.update({decay: EMAModel(parameters, decay=decay) for decay in DECAYS})
        for decay, average in averages.items():
            average.step(parameters)
            seen.averages[decay] = dict(zip(names, average.shadow_params, strict=True))

    def drawn(*arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return class_images(*arguments, **options)
        finally:
            seen.class_images += time.process_time() - started

    with (
        patch.object(TrainingStep, "backward", first),
        patch.object(TrainingStep, "update", last),
        patch.object(subjects_module, "ensure_class_images", drawn),
    ):
        yield seen


class Scorer:
    """Scores adapters of one subject by pictures of it, and of its class, against the base model's.

    drawing, scoring: seconds that both have taken so far.
    """

    def __init__(self, pictures: int, subject: Subject) -> None:
        self.model: BaseModel = load_model(TrainingConfig.pretrained_model_name_or_path)
        self.encoders = encoders_for(True)
        self.drawing = self.scoring = 0.0
        scenes = [prompt for prompt in prompts_for(subject, TOKEN) if prompt.kind == "context"]
        asked = list(zip(cycle(scenes), range(pictures), strict=False))
        self.subject = [(prompt.text, seed) for prompt, seed in asked]
        plain = [(prompt.plain, seed) for prompt, seed in asked]
        self.of_class = [(f"a photo of a {subject.class_word}", seed) for seed in range(pictures)]
        images = [open_image(path) for path in subject.photos()]
        self.judge = Judge(self.encoders, images, [prompt for prompt, _ in plain])
        self.photos = embed(self.encoders, images)
        self.base = self.judge(self._drawn(plain))
        self.base_class = embed(self.encoders, self._drawn(self.of_class))

    def of(self, tensors: dict[str, torch.Tensor], file: Path) -> dict[str, float]:
        """Scores with these tensors in the adapter of a file."""
        adapter, _ = load_adapter(file, self.model.denoiser, self.model.text_encoders)
        adapter.load_state_dict(tensors)
        adapter.merge()
        of_subject, of_any = self._drawn(self.subject), self._drawn(self.of_class)
        adapter.remove()
        started = time.process_time()
        verdict, of_class = self.judge(of_subject), embed(self.encoders, of_any)
        self.scoring += time.process_time() - started
        return {
            "dino": verdict.dino,
            "clip_t": verdict.clip_t,
            "balance": self.judge.balance(verdict, self.base),
            "class_like_subject": metrics.mean(metrics.preservation(of_class.dino, self.photos.dino).tolist()),
            "class_like_subject_base": metrics.mean(
                metrics.preservation(self.base_class.dino, self.photos.dino).tolist()
            ),
            "class_drift": metrics.mean(metrics.drift(of_class.dino, self.base_class.dino).tolist()),
        }

    def _drawn(self, jobs: Sequence[tuple[str, int]]) -> list[Any]:
        started = time.process_time()
        pictures = [sample.image for sample in generate(self.model, jobs, SAMPLER, batch_size=8)]
        self.drawing += time.process_time() - started
        return pictures


def report(records: Sequence[dict[str, Any]]) -> str:
    """Means over subjects and seeds, as a table for each question."""

    def mean(rows: Sequence[dict[str, Any]], name: str) -> str:
        return f"{metrics.mean([row[name] for row in rows]):.3f}"

    names = ("balance", "dino", "clip_t", "class_like_subject", "class_drift")
    by_prior = {prior: [row for row in records if row["prior"] == prior] for prior in PRIORS}
    plain = by_prior["none"]
    rows = [
        [prior, *(mean(found, name) for name in (*names, "step_seconds", "class_seconds"))]
        for prior, found in by_prior.items()
    ]
    rows.append(["base model", "", "", "", mean(plain, "class_like_subject_base"), "0", "", ""])
    kept = [["last step", *(mean(plain, name) for name in names)]]
    kept += [
        [f"average, decay {decay}", *(mean([row["averages"][str(decay)] for row in plain], name) for name in names)]
        for decay in DECAYS
    ]
    priors = table(["prior", *names, "seconds of a step", "of class images"], rows)
    share = sum(row["scoring_seconds"] for row in records) / sum(row["drawing_seconds"] for row in records)
    scoring = f"scoring pictures takes {share:.1%} of the time of drawing them"
    return "\n\n".join([priors, table(["without prior", *names], kept), scoring])


if __name__ == "__main__":
    main()
