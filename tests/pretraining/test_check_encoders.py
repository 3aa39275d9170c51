"""The ranking figures, by hand; and on real photos with the bundled encoders where both are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from eval.subjects import Subject
from gsoft_diffusion.scoring.encoders import load_encoders
from pretraining.check_encoders import embed_subjects, ranks, retrieval

BUNDLED = Path("data/mini_clip"), Path("data/mini_dino")


def test_retrieval_looks_at_the_nearest_other_picture():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert retrieval(embeddings, ["a", "a", "b", "b"]) == 1
    assert retrieval(embeddings, ["a", "b", "b", "b"]) == 0.5


def test_ranks_by_hand():
    rex, max_, cup = (Subject(n, w, False, Path()) for n, w in (("rex", "dog"), ("max", "dog"), ("cup", "cup")))
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    found = ranks(embeddings, [rex, rex, max_, cup])
    assert found["same_subject"] == pytest.approx(1)
    assert found["same_class"] == pytest.approx(0.5**0.5)
    assert found["other_class"] == pytest.approx((0 + 0 + 0.5**0.5) / 3)


@pytest.mark.slow
def test_bundled_encoders_know_unseen_subjects_again():
    encoders = load_encoders(*map(str, BUNDLED))
    for encoder in (encoders.clip, encoders.dino):
        embeddings, subjects = embed_subjects(encoder, Path("data/subjects"))
        assert retrieval(embeddings, [subject.name for subject in subjects]) > 0.3  # chance is 0.08
        found = ranks(embeddings, subjects)
        assert found["same_subject"] > found["other_class"]


@pytest.mark.slow
@pytest.mark.skipif("DREAMBOOTH_DATASET" not in os.environ, reason="set DREAMBOOTH_DATASET to the public data set")
def test_real_photos_rank_as_they_should():
    """Same subject above other subjects of its class, those above other classes."""
    encoders = load_encoders(*map(str, BUNDLED))
    for encoder in (encoders.clip, encoders.dino):
        found = ranks(*embed_subjects(encoder, Path(os.environ["DREAMBOOTH_DATASET"])))
        assert found["same_subject"] > found["same_class"] > found["other_class"]
