"""The scores of pictures of a subject, and of its real photos, by both encoders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.encoders import Encoders


@dataclass(frozen=True)
class Embedded:
    """The same pictures as both encoders see them, (N, D) each."""

    clip: Tensor
    dino: Tensor

    def __getitem__(self, which: list[int]) -> Embedded:
        return Embedded(self.clip[which], self.dino[which])


def embed(encoders: Encoders, images: Iterable[Image.Image]) -> Embedded:
    """Show pictures to both encoders.

    encoders: CLIP and DINO. images: all are held in memory at a time. Returns one embedding `(N, D)` for each encoder.
    """
    images = list(images)
    return Embedded(encoders.clip.embed_images(images), encoders.dino.embed_images(images))


def picture_scores(pictures: Embedded, photos: Embedded, captions: Tensor | None) -> list[dict[str, float]]:
    """Scores of each picture: clip_i, dino, and of the most similar photo clip_nearest, dino_nearest; clip_t.

    pictures: what is scored, N of them. photos: of the subject. captions: `(N, D)` text embeddings of the pictures' own
    captions; without them there is no clip_t. Returns a dict of scores for each picture, in order.
    """
    columns = {
        "clip_i": metrics.clip_i(pictures.clip, photos.clip),
        "dino": metrics.dino(pictures.dino, photos.dino),
        "clip_nearest": metrics.nearest_photo(pictures.clip, photos.clip),
        "dino_nearest": metrics.nearest_photo(pictures.dino, photos.dino),
    }
    if captions is not None:
        columns["clip_t"] = metrics.clip_t(pictures.clip, captions)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def reference_scores(photos: Embedded, captions: Tensor) -> dict[str, float]:
    """Scores of the real photos: with each other, and with captions of scenes that they do not show.

    photos: two or more. captions: `(N, D)` CLIP text embeddings. Returns clip_i, dino, clip_t, and dino_nearest: how
    alike a photo is to the one that it is most like.
    """
    return {
        "clip_i": metrics.real_photo_ceiling(photos.clip),
        "dino": metrics.real_photo_ceiling(photos.dino),
        "clip_t": metrics.cosines(photos.clip, captions).mean().item(),
        "dino_nearest": metrics.cosines(photos.dino, photos.dino).fill_diagonal_(-1).amax(dim=1).mean().item(),
    }
