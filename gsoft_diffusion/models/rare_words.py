"""Names for subjects that the base model does not know, so that nothing it has learned hangs on them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE, lasting_name
from gsoft_diffusion.models.families import BaseModel

UNUSED = {BUNDLED_BASE: "sks"}  # names that a base was made with and never shown; see data/README.md
# Short, and without a meaning that we know of. `sks`, the field's habit, is a rifle that large models have seen.
CANDIDATES = ("ohwx", "zwx", "qvj", "xjq", "vqz", "jzx", "kqv")


def rare_word(model: BaseModel, taken: Collection[str] = ()) -> str:
    """A name that the base model does not know: its unused one, else the first that is no word of its tokenizers.

    model: the base model, with weights or without.
    taken: words that name something already, such as other subjects.

    Raises UserError if all are known or taken.
    """
    free = [word for word in CANDIDATES if not any(is_word(tokenizer, word) for tokenizer in model.tokenizers)]
    unused = UNUSED.get(lasting_name(model.name))
    for word in ([unused] if unused else []) + free:
        if word not in taken:
            return word
    raise UserError("--unique_token: the base model knows all of our rare words; give one of your own")


def is_word(tokenizer: Any, word: str) -> bool:
    """Whether the tokenizer reads the word as a single token. tokenizer: one of transformers'."""
    return len(tokenizer(word, add_special_tokens=False).input_ids) == 1
