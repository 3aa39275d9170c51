"""Names for subjects that the base model does not know, so that nothing it has learned hangs on them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from gsoft_diffusion.foundation.errors import UserError

# Without a meaning that we know of, short, and no part of each other. `sks` is the field's habit; it is also a rifle,
# which Stable Diffusion's tokenizer knows.
CANDIDATES = ("sks", "zwx", "ohwx", "qvj", "xjq", "vqz", "jzx", "kqv")


def rare_word(tokenizers: Iterable[Any], taken: Collection[str] = ()) -> str:
    """The first of `CANDIDATES` that no tokenizer has as a word of its own.

    tokenizers: transformers', those of the base model's text encoders.
    taken: words that name something already, as other subjects.

    Raises UserError if all are known or taken.
    """
    readers = list(tokenizers)
    for word in CANDIDATES:
        if word not in taken and not any(is_word(tokenizer, word) for tokenizer in readers):
            return word
    raise UserError("--unique_token: the base model knows all of our rare words; give one of your own")


def is_word(tokenizer: Any, word: str) -> bool:
    """Whether the tokenizer reads the word as a single token. tokenizer: one of transformers'."""
    return len(tokenizer(word, add_special_tokens=False).input_ids) == 1
