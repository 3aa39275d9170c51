"""Texts for the tasks out of what packages hold: pure functions from their files' contents to texts and labels."""

from __future__ import annotations

import csv
import html
import io
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from examples.language.tasks import FETCHED, PARTS, TOPICS, Texts

SIZES = {"train": 1000, "validation": 250, "test": 600}
Labelled = list[tuple[str, float]]

WORDS = range(6, 17)  # of a sentence


def sentiment(table: str) -> Labelled:
    """Sentences of film reviews. table: `text,label,source` as CSV, label 0 for negative, 1 for positive."""
    rows = csv.DictReader(io.StringIO(table))
    return [(row["text"].strip(), float(row["label"])) for row in rows if row["source"] == "rotten_tomatoes"]


def rating(table: str) -> Labelled:
    """Short messages with the mean of twenty people's ratings, -4 to 4. table: `number, rating, text`, by tabs."""
    rows = (line.split("\t", 2) for line in table.split("\n") if line)
    return [(html.unescape(text).strip(), float(value)) for _, value, text in rows]


def topic(data: str) -> Labelled:
    """Definitions of nouns, as many of each topic. data: WordNet's file `data.noun`."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in data.split("\n"):
        head, _, gloss = line.partition(" | ")
        if gloss and (number := head.split()[1]) in TOPICS:
            found[number].append(gloss.split('; "')[0].strip())  # without the examples
    fewest = min(map(len, found.values()))
    return [(text, place) for place, number in enumerate(TOPICS) for text in _sample(found[number], fewest)]


def acceptability(documents: Iterable[str]) -> Labelled:
    """Sentences as they were written, and others whose words, but for the first one, were put into a random order.

    documents: texts of the Brown corpus, `word/tag` a word and a sentence a line.
    """
    rng = random.Random(0)
    found: Labelled = []
    for document in documents:
        for line in document.split("\n"):
            tokens = [token.rsplit("/", 1) for token in line.split()]
            if not all(len(token) == 2 for token in tokens) or any("-hl" in tag or "-tl" in tag for _, tag in tokens):
                continue  # headings and titles are no sentences
            words = [word for word, _ in tokens]
            if len(words) not in WORDS or words[-1] != ".":
                continue
            label = rng.randrange(2)
            if not label:
                inside = words[1:-1]
                while inside == words[1:-1]:
                    rng.shuffle(inside)
                words[1:-1] = inside
            found.append((_joined(words), float(label)))
    return found


def _joined(words: Sequence[str]) -> str:
    """The words as a text, with quotation marks and blanks as people write them."""
    text = " ".join(words).replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!])", r"\1", text)
    return text[:1].upper() + text[1:]


def _sample(texts: Sequence[str], count: int) -> list[str]:
    return random.Random(0).sample(sorted(set(texts)), min(count, len(set(texts))))


def split(labelled: Labelled, name: str) -> dict[str, Texts]:
    """The three parts of a task, of `SIZES`: a random choice, and no text twice.

    labelled: texts with their labels. name: a key of `FETCHED`.
    """
    unique = list(dict(labelled).items())
    random.Random(f"parts of {name}").shuffle(unique)
    parts, start = {}, 0
    for part in PARTS:
        rows = unique[start : start + SIZES[part]]
        parts[part] = Texts([(text,) for text, _ in rows], [label for _, label in rows])
        start += SIZES[part]
    return parts


READERS: dict[str, Callable[[Any], Labelled]] = {
    "sentiment": sentiment,
    "rating": rating,
    "topic": topic,
    "acceptability": acceptability,
}
assert READERS.keys() == FETCHED.keys()
