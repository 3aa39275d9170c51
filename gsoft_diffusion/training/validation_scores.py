"""Validation pictures one by one, and how like the subject and how true to their prompts they are, step by step.

validation/step-000250/0003_seed1_a-sks-dog-on-the-beach.png   every picture, its prompt and settings inside
validation/step-000250/scores.json                             dino, clip_t and balance, and what they were made with

Step 0 is the base model's: the end of the scale at which nothing is known of the subject.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gsoft.whole_file import whole_file
from gsoft_diffusion.config import Concept, TrainingConfig
from gsoft_diffusion.config.defaults import MINIATURE_BELOW
from gsoft_diffusion.config.prompts import has_words, without_words
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import SCORES, pictures_of
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.folder import Photo
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.generation import Sample
from gsoft_diffusion.sampling.pictures import save_png, slug
from gsoft_diffusion.scoring.encoders import Encoders
from gsoft_diffusion.scoring.judge import Judge, Verdict, encoders_for
from gsoft_diffusion.scoring.metrics import mean


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
    """Keeps and scores a run's validation pictures.

    Of several subjects each is scored by the pictures whose prompts name it, and a step scores the mean over subjects.

    judged_by: plain values on which scores depend besides the adapter.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: BaseModel,
        instance: Mapping[Concept, Sequence[Photo]],
        jobs: Sequence[tuple[str, int]],
        folder: Path,
    ) -> None:
        """config: the run's settings.
        model: the base model.
        instance: each subject's photos.
        jobs: prompt and seed of each picture of a step.
        folder: the run's.

        Raises UserError for a subject that no prompt names, or with fewer than two photos, which have nothing to be
        compared with; and if the best step is to be kept, and no encoders are here that can judge.
        """
        self.config, self.folder = config, folder
        miniature = model.resolution < MINIATURE_BELOW
        encoders = encoders_for(miniature)
        if encoders.miniature and not miniature and config.keep == "best":
            raise UserError(
                '--keep best: the bundled miniature encoders cannot judge photos; pip install "gsoft-diffusion[eval]", '
                "and let the field's encoders be fetched from the hub (see the note above), or leave it out"
            )
        tokens = [concept.unique_token for concept in instance if concept.unique_token]
        self._judges = {
            concept.name: _SubjectJudge(config, encoders, concept, photos, jobs, tokens)
            for concept, photos in instance.items()
        }
        judged_by = {
            "pictures": jobs,
            "sampler": config.sampler.to_dict(),
            "resolution": config.resolution,
            "encoders": encoders.to_dict(),
            "looks": {concept.name: [photo.look for photo in photos] for concept, photos in instance.items()},
        }
        self.judged_by: dict[str, Any] = json.loads(json.dumps(judged_by))  # as they are read again, without tuples

    @property
    def base_is_known(self) -> bool:
        """Whether the base model's pictures were scored as pictures are now, on which every balance depends."""
        return self._base() is not None

    def write(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Keep and score a step's pictures.

        samples: in the order of the jobs. step: optimizer steps done, 0 for the base model's pictures.

        Returns the scores by name. Raises UserError if something cannot be written.
        """
        images, base = [sample.image for sample in samples], self._base() if step else None
        subjects = {name: judge.scores(images, base[name] if base else None) for name, judge in self._judges.items()}
        names = next(iter(subjects.values()))
        scores = {name: mean([each[name] for each in subjects.values()]) for name in names}
        place = pictures_of(self.folder, step)
        shutil.rmtree(place, ignore_errors=True)  # of a run that was killed on the way
        self._keep(samples, step, place)
        photos = {name: asdict(judge.photos) for name, judge in self._judges.items()}
        told = {"step": step, **scores, "subjects": subjects, "photos": photos, **self.judged_by}
        try:
            with whole_file(place / SCORES) as file:
                file.write((json.dumps(told, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {place / SCORES}: {error.strerror}; checkpoints are intact") from error
        return scores

    def _keep(self, samples: Sequence[Sample], step: int, place: Path) -> None:
        config = self.config
        named = [concept.to_dict().items() for concept in config.concepts]
        facts = {
            "model": "adapter" if step else "base",
            "step": step,
            "subjects": [{name: text for name, text in each if text and "dir" not in name} for each in named],
            "sampler": config.sampler.to_dict(),
            "width": config.resolution,
            "height": config.resolution,
        }
        for number, sample in enumerate(samples):
            told = {"prompt": sample.prompt, "seed": sample.seed, **facts}
            save_png(sample.image, place, f"{{}}_seed{sample.seed}_{slug(sample.prompt)}.png", number, told)

    def _base(self) -> dict[str, Verdict] | None:
        """What the base model's pictures score for each subject, None if they were not scored or otherwise."""
        try:
            values = json.loads((pictures_of(self.folder, 0) / SCORES).read_text(encoding="utf-8"))
            if any(values[name] != value for name, value in self.judged_by.items()):
                return None
            return {
                name: Verdict(*(float(values["subjects"][name][each]) for each in ("dino", "clip_t")))
                for name in self._judges
            }
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None


class _SubjectJudge:
    """Scores those of a step's pictures whose prompts name the subject."""

    def __init__(
        self,
        config: TrainingConfig,
        encoders: Encoders,
        concept: Concept,
        photos: Sequence[Photo],
        jobs: Sequence[tuple[str, int]],
        tokens: Sequence[str],
    ) -> None:
        flag = "--keep best" if config.keep == "best" else "--score_validation"
        if len(photos) < 2:
            of = "" if len(config.concepts) == 1 else f" of {concept.name}"
            raise UserError(f"{flag}: needs at least two photos{of}, to compare them with each other")
        name, alone = concept.unique_token or concept.instance_prompt or "", len(config.concepts) == 1
        self._own = [place for place, (prompt, _) in enumerate(jobs) if alone or has_words(prompt, name)]
        if not self._own:
            raise UserError(f"{flag}: no validation prompt names {concept.name}, so that it cannot be scored; add one")
        captions = [without_words(jobs[place][0], tokens) for place in self._own]
        self._judge = Judge(encoders, (open_image(photo.path) for photo in photos), captions)

    @property
    def photos(self) -> Verdict:
        """What the photos themselves score."""
        return self._judge.photos

    def scores(self, images: Sequence[Image.Image], base: Verdict | None) -> dict[str, float]:
        """By name; the balance only if the base model's scores are given."""
        verdict = self._judge(images[place] for place in self._own)
        return asdict(verdict) | ({"balance": self._judge.balance(verdict, base)} if base else {})


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
