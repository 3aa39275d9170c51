"""How many pictures choose a run's best step, and what the validation loss and a smoother curve would choose.

python -m benchmarks.choosing --out benchmarks/results/choosing.json

For each subject one photo is held out, and adapters are trained on the others at two rates. Their steps are drawn with
the same prompts and seeds. Pictures of half of the seeds choose a step, as `--keep best` does; those of the other half
judge it. Choices by fewer pictures are repeated with other ones. Measurements are kept as they come.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Records, file_to_write, table
from eval.pick_checkpoint import adapters_of
from eval.prompts import prompts_for
from eval.subjects import BUNDLED, Subject, read_subjects
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config import SamplerConfig, TrainingConfig
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.judge import encoders_for
from gsoft_diffusion.scoring.pictures import embed, picture_scores
from gsoft_diffusion.training.progress import read_progress
from gsoft_diffusion.training.train import train

TOKEN = "sks"
FIRST_SEED = 100
SUBJECTS = ("teddy_bear", "blue_car", "running_shoe")
RATES = (2e-4, 8e-4)  # the miniature's default, and one that learns the photos by heart
COUNTS = (4, 8, 16, 32)  # pictures that choose
REPETITIONS = 400  # of each choice
WAYS = {"as it is": 0, "averaged with its neighbours": 1}  # how far the average of a step reaches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--validations", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=8, help="for each prompt, half of them to choose by")
    parser.add_argument("--sampling_steps", type=int, default=20)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "subjects", "learning_rates")}
    records = Records(args.out, settings)
    known = {subject.name: subject for subject in read_subjects(BUNDLED)}
    for rate in args.learning_rates:
        for name in args.subjects:
            if not records.has(subject=name, learning_rate=rate):
                records.add(subject=name, learning_rate=rate, **measure(args, known[name], rate))
    print(report(records.records, args.pictures))


def measure(args: Any, subject: Subject, rate: float) -> dict[str, Any]:
    """Train one adapter, and score every picture of its steps. Raises KeyboardInterrupt if a signal ends the training.

    Scores of pictures are in the order of prompts and, within each, seeds: `dino` and `clip_t` of every step (`steps`)
    and of the base model (`base`). `photos` has the photos' own: one `dino`, and a `clip_t` for each picture's prompt.
    """
    with tempfile.TemporaryDirectory() as folder:
        photos, held_out, run = (Path(folder, name) for name in ("photos", "held_out", "run"))
        *trained, last = subject.photos()
        for place, paths in ((photos, trained), (held_out, [last])):
            place.mkdir()
            for path in paths:
                shutil.copy(path, place)
        every = args.steps // args.validations
        result = train(
            TrainingConfig(
                str(photos),
                class_word=subject.class_word,
                unique_token=TOKEN,
                output_dir=str(run),
                max_train_steps=args.steps,
                train_batch_size=args.batch_size,
                learning_rate=rate,
                report_to="none",
                num_validation_images=0,
                checkpointing_steps=every,
                validation_steps=every,
                validation_loss=True,
                validation_data_dir=str(held_out),
            )
        )
        if result.interrupted:
            raise KeyboardInterrupt
        scorer = Scorer(subject, trained, args)
        losses = {each.step: each.validation_loss for each in read_progress(run)}
        adapters = adapters_of(run)
        return {
            "base": scorer.base,
            "photos": scorer.photos,
            "steps": {str(step): scorer.of(path) for step, path in sorted(adapters.items())},
            "validation_loss": {str(step): losses[step] for step in sorted(adapters)},
        }


class Scorer:
    """Scores every picture that adapters of one subject draw of it."""

    def __init__(self, subject: Subject, photos: Sequence[Path], args: Any) -> None:
        self._model: BaseModel = load_model(TrainingConfig.pretrained_model_name_or_path)
        self._encoders = encoders_for(True)
        self._sampler = SamplerConfig(num_inference_steps=args.sampling_steps)
        asked = [prompt for prompt in prompts_for(subject, TOKEN, max_prompts=args.prompts) if prompt.kind == "context"]
        self._jobs = [(prompt, FIRST_SEED + number) for prompt in asked for number in range(args.pictures)]
        self._photos = embed(self._encoders, map(open_image, photos))
        self._captions = self._encoders.clip.embed_texts([prompt.plain for prompt, _ in self._jobs])
        self.photos = {
            "dino": metrics.real_photo_ceiling(self._photos.dino),
            "clip_t": metrics.cosines(self._captions, self._photos.clip).mean(dim=1).tolist(),
        }
        self.base = self._scores([(prompt.plain, seed) for prompt, seed in self._jobs])

    def of(self, file: Path) -> dict[str, list[float]]:
        """Of the pictures with the adapter in a file."""
        adapter, _ = load_adapter(file, self._model.denoiser, self._model.text_encoders)
        adapter.merge()
        scores = self._scores([(prompt.text, seed) for prompt, seed in self._jobs])
        adapter.remove()
        return scores

    def _scores(self, jobs: Sequence[tuple[str, int]]) -> dict[str, list[float]]:
        pictures = [sample.image for sample in generate(self._model, jobs, self._sampler, batch_size=16)]
        rows = picture_scores(embed(self._encoders, pictures), self._photos, self._captions)
        return {name: [row[name] for row in rows] for name in ("dino", "clip_t")}


def balances(record: Mapping[str, Any], pictures: Sequence[int]) -> np.ndarray:
    """The balance of each step, (S,), by these pictures alone.

    record: of a subject. pictures: their places.
    """

    def mean(scores: Mapping[str, Sequence[float]], name: str) -> float:
        return metrics.mean([scores[name][place] for place in pictures])

    base = mean(record["base"], "dino"), mean(record["base"], "clip_t")
    photos = record["photos"]["dino"], mean(record["photos"], "clip_t")
    return np.array(
        [metrics.balance(mean(step, "dino"), mean(step, "clip_t"), base, photos) for step in record["steps"].values()]
    )


def averaged(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and as many on either side as there are, up to `reach`, (S,)."""
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def chosen(record: Mapping[str, Any], pool: Sequence[int], count: int, reach: int) -> np.ndarray:
    """Which step is chosen, (REPETITIONS,), by `count` random pictures of the pool.

    record: of a subject. pool: places of pictures. reach: of the average over neighbouring steps.
    """
    rng = np.random.default_rng(0)
    picks = (rng.choice(pool, count, replace=False).tolist() for _ in range(REPETITIONS))
    return np.array([averaged(balances(record, pick), reach).argmax() for pick in picks])


def halves(pictures: int, for_each_prompt: int) -> tuple[list[int], list[int]]:
    """The places of the pictures that choose and of those that judge: of each prompt the first and the other half."""
    first = [place % for_each_prompt < for_each_prompt // 2 for place in range(pictures)]
    return [i for i in range(pictures) if first[i]], [i for i in range(pictures) if not first[i]]


def report(records: Sequence[Mapping[str, Any]], for_each_prompt: int) -> str:
    """For each rate a table: the balance, by the judging pictures, of what each way keeps, subject by subject."""
    rates = dict.fromkeys(record["learning_rate"] for record in records)
    return "\n\n".join(
        f"Learning rate {rate:g}:\n\n"
        + _table([record for record in records if record["learning_rate"] == rate], for_each_prompt)
        for rate in rates
    )


def _table(records: Sequence[Mapping[str, Any]], for_each_prompt: int) -> str:
    ways: dict[str, list[float]] = {}

    def add(way: str, values: Iterable[float]) -> None:
        ways.setdefault(way, []).append(metrics.mean(list(values)))

    for record in records:
        pool, judging = halves(len(record["base"]["dino"]), for_each_prompt)
        judged = balances(record, judging)
        losses = list(record["validation_loss"].values())
        add("last step", judged[-1:])
        for name, reach in WAYS.items():
            for count in (count for count in COUNTS if count <= len(pool)):
                add(f"best by {count} pictures, {name}", judged[chosen(record, pool, count, reach)])
        add("lowest validation loss", [judged[int(np.argmin(losses))]])
        add("the best there is", [judged.max()])
    names = [record["subject"] for record in records]
    rows = [[way, f"{metrics.mean(values):.3f}", *(f"{value:.3f}" for value in values)] for way, values in ways.items()]
    return table(["kept", "mean", *names], rows)


if __name__ == "__main__":
    main()
