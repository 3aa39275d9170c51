"""Validation pictures one by one, and how like the subject and how true to their prompts they are, step by step.

validation/step-000250/0003_seed1_a-sks-dog-on-the-beach.png   every picture, its prompt and settings inside
validation/step-000250/scores.json                             dino, clip_t and balance, and what they were made with

Step 0 is the base model's: the end of the scale at which nothing is known of the subject.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gsoft.whole_file import whole_file
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.config.defaults import MINIATURE_BELOW
from gsoft_diffusion.config.prompts import without_words
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import SCORES, pictures_of
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.folder import Photo
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.generation import Sample
from gsoft_diffusion.sampling.pictures import save_png, slug
from gsoft_diffusion.scoring.judge import Judge, Verdict, encoders_for


@dataclass(frozen=True)
class StepScores:
    """What a step's pictures score: likeness to the photos, truth to the prompts, and the balance of both.

    balance: from 0 to 1; None of the base model itself, and where its scores are not known.
    """

    step: int
    dino: float
    clip_t: float
    balance: float | None


class ValidationScores:
    """Keeps and scores a run's validation pictures."""

    def __init__(
        self,
        config: TrainingConfig,
        model: BaseModel,
        instance: Sequence[Photo],
        jobs: Sequence[tuple[str, int]],
        folder: Path,
    ) -> None:
        """config: the run's settings.
        model: the base model.
        instance: the subject's photos.
        jobs: prompt and seed of each picture of a step.
        folder: the run's.

        Raises UserError for several subjects, and for fewer than two photos, which have nothing to be compared with.
        """
        if len(config.concepts) > 1:
            raise UserError("--score_validation: compares with one subject, and --concepts_list names several")
        if len(instance) < 2:
            raise UserError("--score_validation: needs at least two photos, to compare them with each other")
        self.config, self.folder = config, folder
        self.subject = config.concepts[0]
        tokens = [token for token in [self.subject.unique_token] if token]
        captions = [without_words(prompt, tokens) for prompt, _ in jobs]
        encoders = encoders_for(model.resolution < MINIATURE_BELOW, model.device)
        self.judge = Judge(encoders, (open_image(photo.path) for photo in instance), captions)

    def write(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Keep and score a step's pictures.

        samples: in the order of the jobs. step: optimizer steps done, 0 for the base model's pictures.

        Returns the scores by name. Raises UserError if something cannot be written.
        """
        verdict, base = self.judge(sample.image for sample in samples), self._base()
        scores = asdict(verdict)
        if step and base:
            scores["balance"] = self.judge.balance(verdict, base)
        place = pictures_of(self.folder, step)
        shutil.rmtree(place, ignore_errors=True)  # of a run that was killed on the way
        config = self.config
        facts = {
            "model": "adapter" if step else "base",
            "step": step,
            "subjects": [{name: text for name, text in self.subject.to_dict().items() if text and "dir" not in name}],
            "sampler": config.sampler.to_dict(),
            "width": config.resolution,
            "height": config.resolution,
        }
        for number, sample in enumerate(samples):
            told = {"prompt": sample.prompt, "seed": sample.seed, **facts}
            save_png(sample.image, place, f"{{}}_seed{sample.seed}_{slug(sample.prompt)}.png", number, told)
        try:
            with whole_file(place / SCORES) as file:
                rest = {"photos": asdict(self.judge.photos), "encoders": self.judge.encoders.to_dict()}
                file.write((json.dumps({"step": step, **scores, **rest}, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {place / SCORES}: {error.strerror}; checkpoints are intact") from error
        return scores

    def _base(self) -> Verdict | None:
        found = read_scores(self.folder, 0)
        return Verdict(found.dino, found.clip_t) if found else None


def read_scores(folder: Path, step: int) -> StepScores | None:
    """What a run's pictures of a step score, None if they were not scored or that cannot be read.

    folder: the run's. step: optimizer steps done, 0 for the base model's pictures.
    """
    try:
        values = json.loads((pictures_of(folder, step) / SCORES).read_text(encoding="utf-8"))
        balance = values.get("balance")
        known = balance if balance is None else float(balance)
        return StepScores(step, float(values["dino"]), float(values["clip_t"]), known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def best_step(scores: Sequence[StepScores]) -> int | None:
    """The step of the best balance, the earliest of equals; None if no balance is known, or none is above 0."""
    known = [(each.balance, -each.step) for each in scores if each.balance]
    return -max(known)[1] if known else None
