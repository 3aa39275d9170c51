"""How well pictures show a subject, on one scale: from the base model, which does not know it, to its real photos."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.encoders import MINI_CLIP, MINI_DINO, Encoders, load_encoders
from gsoft_diffusion.scoring.pictures import embed, picture_scores, reference_scores


@dataclass(frozen=True)
class Verdict:
    """Mean scores of pictures: `dino` with the photos, `clip_t` with their captions."""

    dino: float
    clip_t: float


class Judge:
    """Scores pictures of one subject, always of the same captions in the same order."""

    def __init__(self, encoders: Encoders, photos: Iterable[Image.Image], captions: Sequence[str]) -> None:
        """encoders: what scores.
        photos: the subject's, two or more.
        captions: of the pictures that will be scored, without the subject's name, which encoders do not know.
        """
        self.encoders = encoders
        self._photos = embed(encoders, photos)
        self._captions = encoders.clip.embed_texts(captions)
        self.photos = _verdict(reference_scores(self._photos, self._captions))

    def means(self, pictures: Iterable[Image.Image]) -> dict[str, float]:
        """The mean of each score of `picture_scores`. pictures: one for each caption."""
        rows = picture_scores(embed(self.encoders, pictures), self._photos, self._captions)
        return {name: metrics.mean([row[name] for row in rows]) for name in rows[0]}

    def __call__(self, pictures: Iterable[Image.Image]) -> Verdict:
        """The scores of pictures, one for each caption."""
        return _verdict(self.means(pictures))

    def balance(self, verdict: Verdict, base: Verdict) -> float:
        """One number for both, between 0 and 1, as `metrics.balance` has it.

        verdict: of the adapter's pictures. base: of the base model's for the same captions and seeds.
        """
        ends = (base.dino, base.clip_t), (self.photos.dino, self.photos.clip_t)
        return metrics.balance(verdict.dino, verdict.clip_t, *ends)


def _verdict(scores: Mapping[str, float]) -> Verdict:
    return Verdict(scores["dino"], scores["clip_t"])


def encoders_for(miniature: bool) -> Encoders:
    """The encoders for a base model's pictures: for a miniature's the bundled ones, else the field's if they load.

    miniature: whether the base model is one, whose pictures say little to the field's encoders.

    They are on the CPU: a few pictures take it little time, and a run's GPU has no room to spare.
    """
    names = (MINI_CLIP, MINI_DINO) if miniature else ("auto", "auto")
    return load_encoders(*names)
