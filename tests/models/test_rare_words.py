"""Names that the base model does not know."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_architecture
from gsoft_diffusion.models.rare_words import CANDIDATES, rare_word


class Words:
    """A tokenizer that knows some words, and letters."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0] if text in self.words else list(text))


def model(name: str, *tokenizers: Words) -> SimpleNamespace:
    return SimpleNamespace(name=name, tokenizers=tokenizers)


def test_the_bundled_base_has_a_name_of_its_own_for_it():
    bundled = load_architecture("data/mini_base")
    assert rare_word(bundled) == "sks"
    assert rare_word(bundled, taken=("sks",)) in CANDIDATES


def test_a_word_that_one_tokenizer_knows_is_passed_over():
    assert rare_word(model("a/b", Words(), Words(CANDIDATES[0], CANDIDATES[1]))) == CANDIDATES[2]
    assert rare_word(model("a/b", Words()), taken=CANDIDATES[:1]) == CANDIDATES[1]


def test_it_says_if_there_is_none():
    with pytest.raises(UserError, match="--unique_token: the base model knows all of our rare words"):
        rare_word(model("a/b", Words(*CANDIDATES)))
