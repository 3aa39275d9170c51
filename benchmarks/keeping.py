"""What the best step, the validation loss, an average of the adapter and both kinds of prior preservation are good for.

python -m benchmarks.keeping --out benchmarks/results/keeping.json

For each subject one photo is held out, and three adapters are trained on the others: without prior preservation, with
class images, and with the base model's predictions. The first run keeps its best step, measures the validation loss,
and averages its adapter beside the training. Prompts and seeds of the scores are not those of the validation. Seconds
are the processor's, so other programs may run meanwhile; measurements are kept as they come.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel

from benchmarks.measure import Records, table
from eval.prompts import prompts_for
from eval.subjects import BUNDLED, Subject, read_subjects
from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config import SamplerConfig, TrainingConfig
from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.judge import Judge, encoders_for
from gsoft_diffusion.scoring.pictures import embed
from gsoft_diffusion.training import subjects as subjects_module
from gsoft_diffusion.training.curve import CURVE_TABLE
from gsoft_diffusion.training.progress import read_progress
from gsoft_diffusion.training.step import TrainingStep
from gsoft_diffusion.training.train import train
from gsoft_diffusion.training.validation import Validation
from gsoft_diffusion.training.validation_scores import ValidationScores

PRIORS: dict[str, dict[str, Any]] = {
    "none": {},
    "class_images": {"with_prior_preservation": True},
    "base_prediction": {"with_prior_preservation": True, "prior_target": "base_prediction"},
}
DECAYS = (0.9, 0.98)
TOKEN = "sks"
SAMPLER = SamplerConfig(num_inference_steps=20)
FIRST_SEED = 100  # of the scored pictures; validation's begin with the run's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=["teddy_bear", "blue_car"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--validations", type=int, default=6, help="in the first of the three runs")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--class_images", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=6, help="scored, of the subject and of its class each")
    parser.add_argument("--out", type=expanded_path, required=True, help="JSON file of the measurements")
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
    """Train one adapter and score it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        photos, held_out = Path(folder, "photos"), Path(folder, "held_out")
        *trained, last = subject.photos()
        for place, paths in ((photos, trained), (held_out, [last])):
            place.mkdir()
            for path in paths:
                shutil.copy(path, place)
        config = TrainingConfig(
            str(photos),
            class_word=subject.class_word,
            unique_token=TOKEN,
            output_dir=f"{folder}/run",
            max_train_steps=args.steps,
            train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            seed=seed,
            report_to="none",
            num_validation_images=0,
            checkpointing_steps=0,
            sampler=SAMPLER,
            **PRIORS[prior],
        )
        if prior == "class_images":
            config = replace(config, num_class_images=args.class_images)
        if prior == "none":
            config = replace(
                config,
                keep="best",
                patience=0,
                num_validation_images=1,
                validation_steps=args.steps // args.validations,
                validation_loss=True,
                validation_data_dir=str(held_out),
            )
        with watched(args.steps) as seen:
            result = train(config)
        scorer = Scorer(args, subject, trained)
        found: dict[str, Any] = {"step_seconds": statistics.median(seen.steps), "class_seconds": seen.class_images}
        if prior != "none":
            return found | scorer.of(read_adapter(result.adapter).tensors, result.adapter)
        run, kept = result.adapter.parent, read_adapter(result.adapter)
        losses = [each.loss for each in read_progress(run)]
        return {
            **found,
            **scorer.of(seen.last, result.adapter),
            "best": {"step": kept.step, **scorer.of(kept.tensors, result.adapter)},
            "averages": {str(decay): scorer.of(tensors, result.adapter) for decay, tensors in seen.averages.items()},
            "validation_seconds": seen.drawing,
            "scoring_seconds": seen.scoring,
            "loss_of_a_step": {"mean": statistics.mean(losses), "deviation": statistics.stdev(losses)},
            "curve": (run / CURVE_TABLE).read_text(),
        }


class Watched:
    """What is seen of a run: seconds of its steps, of drawing, of scoring and of class images; its adapter and averages
    of it after the last step.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.drawing = self.scoring = self.class_images = 0.0
        self.last: dict[str, torch.Tensor] = {}
        self.averages: dict[float, dict[str, torch.Tensor]] = {}


@contextmanager
def watched(last_step: int) -> Iterator[Watched]:
    """Inside the block a run is watched."""
    seen, averages = Watched(), {}
    backward, update = TrainingStep.backward, TrainingStep.update
    began = [0.0]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                setattr(seen, name, getattr(seen, name) + time.process_time() - started)

        return called

    def first(step: TrainingStep, batch: Any) -> Any:
        began[0] = time.process_time()
        return backward(step, batch)

    def last(step: TrainingStep, *arguments: Any) -> None:
        update(step, *arguments)
        seen.steps.append(time.process_time() - began[0])
        parameters = list(step.state.adapter.parameters())
        if not averages:
            averages.update({decay: EMAModel(parameters, decay=decay) for decay in DECAYS})
        for average in averages.values():
            average.step(parameters)
        if step.state.step + 1 == last_step:
            names = [name for name, _ in step.state.adapter.named_parameters()]
            seen.last = dict(zip(names, (p.detach().clone() for p in parameters), strict=True))
            for decay, average in averages.items():
                seen.averages[decay] = dict(zip(names, average.shadow_params, strict=True))

    with (
        patch.object(TrainingStep, "backward", first),
        patch.object(TrainingStep, "update", last),
        patch.object(Validation, "draw_here", timed("drawing", Validation.draw_here)),
        patch.object(ValidationScores, "write", timed("scoring", ValidationScores.write)),
        patch.object(
            subjects_module, "ensure_class_images", timed("class_images", subjects_module.ensure_class_images)
        ),
    ):
        yield seen


class Scorer:
    """Scores adapters of one subject by pictures of it, and of its class, against the base model's."""

    def __init__(self, args: Any, subject: Subject, photos: Sequence[Path]) -> None:
        self.model: BaseModel = load_model(TrainingConfig.pretrained_model_name_or_path)
        self.encoders = encoders_for(True)
        asked = [
            prompt for prompt in prompts_for(subject, TOKEN, max_prompts=args.pictures) if prompt.kind == "context"
        ]
        seeds = range(FIRST_SEED, FIRST_SEED + args.pictures)
        self.subject = list(zip((prompt.text for prompt in asked), seeds, strict=False))
        plain = list(zip((prompt.plain for prompt in asked), seeds, strict=False))
        self.of_class = [(f"a photo of a {subject.class_word}", seed) for seed in seeds]
        images = [open_image(path) for path in photos]
        self.judge = Judge(self.encoders, images, [prompt for prompt, _ in plain])
        self.photos = embed(self.encoders, images)
        self.base = self.judge(self._drawn(plain))
        self.base_class = embed(self.encoders, self._drawn(self.of_class))

    def of(self, tensors: dict[str, torch.Tensor], file: Path) -> dict[str, float]:
        """Scores with these tensors in the adapter of a file."""
        adapter, _ = load_adapter(file, self.model.denoiser, self.model.text_encoders)
        adapter.load_state_dict(tensors)
        adapter.merge()
        verdict = self.judge(self._drawn(self.subject))
        of_class = embed(self.encoders, self._drawn(self.of_class))
        adapter.remove()
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
        return [sample.image for sample in generate(self.model, jobs, SAMPLER, batch_size=8)]


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
    kept.append(["best step", *(mean([row["best"] for row in plain], name) for name in names)])
    kept += [
        [f"average, decay {decay}", *(mean([row["averages"][str(decay)] for row in plain], name) for name in names)]
        for decay in DECAYS
    ]
    share = sum(row["scoring_seconds"] for row in plain) / sum(row["validation_seconds"] for row in plain)
    return "\n\n".join(
        [
            table(["prior", *names, "seconds of a step", "of class images"], rows),
            table(["without prior", *names], kept),
            f"scoring takes {share:.1%} of the validation's time",
            *(f"{row['subject']}, kept step {row['best']['step']}\n{row['curve']}" for row in plain),
        ]
    )


if __name__ == "__main__":
    main()
