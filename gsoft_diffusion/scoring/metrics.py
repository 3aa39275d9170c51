"""What is measured, as pure functions of embeddings, and how measurements are averaged.

Embeddings are `(N, D)`, one row for each picture or text, of any length: only directions matter. Similarities are
cosines, in [-1, 1]. Everything is computed in float64.

Sources: CLIP-I, CLIP-T, DINO, PRES and DIV are those of DreamBooth (Ruiz et al., arXiv 2208.12242, §4.2 and §4.4), with
DIV as a distance of embeddings instead of LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Similarity of every row of `a` (N, D) with every row of `b` (M, D): (N, M)."""
    return normalize(a.double(), dim=-1) @ normalize(b.double(), dim=-1).T


def image_similarity(pictures: Tensor, photos: Tensor) -> Tensor:
    """For each picture the mean similarity with the subject's photos, (N,): CLIP-I or DINO, by the encoder.

    pictures, photos: embeddings, (N, D) and (M, D).
    """
    return cosines(pictures, photos).mean(dim=1)


clip_i = dino = image_similarity


def clip_t(pictures: Tensor, prompts: Tensor) -> Tensor:
    """For each picture the similarity with its own prompt, (N,).

    pictures, prompts: embeddings, both (N, D); row `i` of `prompts` belongs to picture `i`. Raises ValueError if they
    are not as many.
    """
    if pictures.shape != prompts.shape:
        raise ValueError(f"{len(pictures)} pictures, {len(prompts)} prompts: each picture needs its prompt")
    return (normalize(pictures.double(), dim=-1) * normalize(prompts.double(), dim=-1)).sum(dim=1)


def nearest_photo(pictures: Tensor, photos: Tensor) -> Tensor:
    """For each picture the similarity with the photo it is most like, (N,). Near 1: the photo was copied.

    pictures, photos: embeddings, (N, D) and (M, D).
    """
    return cosines(pictures, photos).amax(dim=1)


def preservation(class_pictures: Tensor, photos: Tensor) -> Tensor:
    """PRES, (N,): how much pictures of *any* member of the class look like the subject. Lower is better.

    class_pictures: embeddings (N, D) of what the tuned model draws for the class. photos: the subject's, (M, D).
    """
    return image_similarity(class_pictures, photos)


def diversity(pictures: Tensor) -> float:
    """DIV: mean of `1 − cosine` over all pairs of pictures of one prompt. Higher is more diverse.

    Raises ValueError if there are fewer than two pictures.
    """
    if len(pictures) < 2:
        raise ValueError("diversity needs at least two pictures of a prompt")
    rows, columns = torch.triu_indices(len(pictures), len(pictures), offset=1)
    return float(1 - cosines(pictures, pictures)[rows, columns].mean())


def drift(pictures: Tensor, base_pictures: Tensor) -> Tensor:
    """`1 − cosine` between what the tuned and the base model draw for the same unrelated prompt and seed, (N,).

    pictures, base_pictures: embeddings, both (N, D), in the same order. Raises ValueError if they are not as many.
    """
    return 1 - clip_t(pictures, base_pictures)


def real_photo_ceiling(photos: Tensor) -> float:
    """Mean similarity of different photos of the subject: what a picture taken of it would score."""
    return 1 - diversity(photos)


def balance(fidelity: float, prompt: float, base: tuple[float, float], photos: tuple[float, float]) -> float:
    """One number for the trade-off, between 0 and 1: harmonic mean of how far each end is reached.

    fidelity, prompt: the model's scores, for looking like the subject and for following prompts.
    base, photos: (fidelity, prompt following) of the base model and of the real photos.

    Fidelity counts from 0, the base model's, to 1, the real photos' own; prompt following from 0, that of the real
    photos (a model that copies them and ignores the prompt), to 1, the base model's. Each is cut to [0, 1].
    """
    subject_share = _share(fidelity, base[0], photos[0])
    prompt_share = _share(prompt, photos[1], base[1])
    total = subject_share + prompt_share
    return 2 * subject_share * prompt_share / total if total else 0.0


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


# Averages


def mean(values: Sequence[float]) -> float:
    """Their mean; ValueError if there are none, so that no table ever shows the average of nothing."""
    if not len(values):
        raise ValueError("mean of no values")
    return float(np.mean(np.asarray(values, dtype=np.float64)))
