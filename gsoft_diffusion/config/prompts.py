"""The words of prompts: where the subject's name is in them, and putting it there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.text_files import composed

# What may stand before the subject's name in a prompt, and is none of it.
NOT_NAMES = re.compile(
    r"a|an|the|this|that|these|those|my|your|his|her|its|our|their|one|some|of|in|on|at|to|by|with|from|for|and|or|"
    r"photo|photograph|picture|image|portrait|drawing|painting"
)


def token_in(prompt: str, class_word: str | None) -> str | None:
    """The words before the class word in a prompt, back to an article, a preposition or the like; None without any.

    prompt: of a subject's photos. class_word: what the subject is, in one word or several, or None.

    For example "zwx" in "a photo of a zwx teddy bear on a bed".
    """
    words, wanted = prompt.split(), (class_word or "").split()
    at = _place(words, wanted)
    name: list[str] = []
    while wanted and at - len(name) > 0:
        word = words[at - len(name) - 1]
        if NOT_NAMES.fullmatch(word.lower()) or word[-1] in ",.;:!?":
            break
        name.insert(0, word)
    return " ".join(name) or None


def has_words(text: str, words: str) -> bool:
    """Whether the text contains these words, one after the other."""
    return _place(text.split(), words.split()) >= 0


def _place(words: Sequence[str], wanted: Sequence[str]) -> int:
    """The index at which the wanted words begin, ignoring case and trailing punctuation; -1 if they do not occur."""

    def plain(some: Sequence[str]) -> list[str]:
        return [(re.sub(r"('s|[^\w>])*$", "", word) or word).casefold() for word in some]

    starts = range(len(words) - len(wanted) + 1)
    return next((at for at in starts if plain(words[at : at + len(wanted)]) == plain(wanted)), -1)


def with_names(prompt: str, subjects: Sequence[Mapping[str, str | None]]) -> str:
    """The prompt with names filled in, as in DreamBooth's prompt lists.

    prompt: `{0}` in it is the first subject's unique token and `{1}` its class word; `{2}` and `{3}` are the second
    subject's, and so on.
    subjects: for each what is known of `unique_token`, `class_word` and `instance_prompt`.

    Raises UserError for a name that is not known.
    """

    def word(found: re.Match[str]) -> str:
        subject, part = divmod(int(found[1]), 2)
        name = ("unique_token", "class_word")[part]
        if subject >= len(subjects):
            raise UserError(f"{prompt!r}: {found[0]} stands for subject {subject + 1}, but there are {len(subjects)}")
        if not (known := subjects[subject].get(name)):
            trained = subjects[subject].get("instance_prompt")
            how = f', only its prompt "{trained}"' if trained else ""
            raise UserError(
                f"{prompt!r}: {found[0]} cannot be filled in: the subject's {name} is not known{how}; "
                "write out its name"
            )
        return known

    return re.sub(r"\{(\d{1,2})\}", word, prompt)


def without_words(text: str, words: Iterable[str]) -> str:
    """The text without these words, each with the blank behind it, such as the unique tokens in prompts."""
    for each in words:
        text = re.sub(rf"(?<!\S){re.escape(each)} ", "", text)
    return text


def plain_noun(text: str) -> str:
    """A class word without an article before it, which prompts add themselves, and without surplus blanks."""
    return re.sub(r"^(a|an|the) (?=.)", "", " ".join(composed(text).split()), flags=re.IGNORECASE)


def with_article(noun: str) -> str:
    """`noun` with its indefinite article by the sound it starts with: a dog, an orange, a unicorn."""
    vowel = re.match(r"(?!uni|use|eu|one\b)[aeiou]|hour|honest", noun.lower())
    return f"{'an' if vowel else 'a'} {noun}"
