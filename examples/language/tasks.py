"""The tasks: texts in three parts, what is asked of them, and how answers are scored.

A fetched task is a file `<task>.jsonl` of lines `{"part": "train", "text": "…", "label": "positive"}`, where a rating
is a number. Tasks of GLUE come from the hub.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.hub_access import why_unreachable
from gsoft_diffusion.foundation.text_files import read_text

Metric = Literal["accuracy", "matthews", "pearson"]
PARTS = ("train", "validation", "test")
GLUE = "nyu-mll/glue"
HELD_OUT = 2000  # of GLUE's training texts, at most, and a tenth at most: its own validation part is the test here


@dataclass(frozen=True)
class Task:
    """What is asked of a text.

    metric: what answers are scored by. labels: names of the classes; none where the answer is a rating. columns: of
    GLUE's tables, those with the text or the two texts.
    """

    metric: Metric
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


TOPICS = {  # the topics of WordNet's nouns that have a thousand glosses or more, and are plain to tell apart
    **{"05": "animal", "06": "artifact", "08": "body", "10": "communication", "13": "food", "14": "group"},
    **{"15": "location", "18": "person", "20": "plant", "26": "state", "27": "substance", "28": "time"},
}
FETCHED = {
    "sentiment": Task("accuracy", ("negative", "positive")),
    "rating": Task("pearson"),
    "topic": Task("accuracy", tuple(TOPICS.values())),
    "acceptability": Task("matthews", ("unacceptable", "acceptable")),
}
FROM_GLUE = {
    "mnli": Task("accuracy", ("entailment", "neutral", "contradiction"), ("premise", "hypothesis")),
    "sst2": Task("accuracy", ("negative", "positive"), ("sentence",)),
    "cola": Task("matthews", ("unacceptable", "acceptable"), ("sentence",)),
    "qqp": Task("accuracy", ("not_duplicate", "duplicate"), ("question1", "question2")),
    "qnli": Task("accuracy", ("entailment", "not_entailment"), ("question", "sentence")),
    "rte": Task("accuracy", ("entailment", "not_entailment"), ("sentence1", "sentence2")),
    "mrpc": Task("accuracy", ("not_equivalent", "equivalent"), ("sentence1", "sentence2")),
    "stsb": Task("pearson", (), ("sentence1", "sentence2")),
}
TASKS = FETCHED | FROM_GLUE


class Texts(NamedTuple):
    """One part of a task.

    texts: each one sentence or two. labels: for each the number of its class, or its rating.
    """

    texts: list[tuple[str, ...]]
    labels: list[float]


def read_task(name: str, data_dir: str | None) -> dict[str, Texts]:
    """The parts of a task: train, validation (for choices) and test (for the report).

    name: a key of `TASKS`. data_dir: folder of fetched tasks; not used for GLUE's. Raises UserError if they are not
    available, or a line is not right.
    """
    if name in FROM_GLUE:
        return _read_glue(name)
    if data_dir is None:
        raise UserError(f"--task {name} needs --data_dir, the folder that python -m examples.language.fetch has made")
    path = Path(data_dir) / f"{name}.jsonl"
    parts = {part: Texts([], []) for part in PARTS}
    for number, line in enumerate(read_text(path).strip("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
            part, text, label = parts[row["part"]], row["text"], row["label"]
            labels = TASKS[name].labels
            value = labels.index(label) if labels else float(label)
            if not isinstance(text, str) or not np.isfinite(value):
                raise ValueError("text or label is of a wrong type")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: is not a text of this task ({first_line(error)})") from error
        part.texts.append((text,))
        part.labels.append(value)
    if empty := [part for part, texts in parts.items() if not texts.texts]:
        raise UserError(f"{path}: has no texts for {', '.join(empty)}; fetch it again")
    return parts


def _read_glue(name: str) -> dict[str, Texts]:
    why = why_unreachable()  # before the library is loaded, which asks for long
    try:
        from datasets import load_dataset  # not a requirement: only these tasks need it
    except ImportError as error:
        raise UserError(f"--task {name} is one of GLUE's, which needs: pip install datasets") from error
    try:
        tables = load_dataset(GLUE, name)
    except Exception as error:  # of many kinds, from several libraries
        raise UserError(
            f"--task {name}: {GLUE} cannot be downloaded from the hub ({why or first_line(error)}); without it use a "
            "task of python -m examples.language.fetch"
        ) from error
    validation = "validation_matched" if name == "mnli" else "validation"
    columns = TASKS[name].columns

    def texts(rows: Sequence[Any]) -> Texts:
        return Texts([tuple(row[column] for column in columns) for row in rows], [float(row["label"]) for row in rows])

    known = texts(list(tables["train"]))
    train, held_out = hold_out(known.texts, phrases=name == "sst2")
    return {
        "train": Texts([known.texts[row] for row in train], [known.labels[row] for row in train]),
        "validation": Texts([known.texts[row] for row in held_out], [known.labels[row] for row in held_out]),
        "test": texts(list(tables[validation])),  # the labels of GLUE's own test part are not public
    }


def hold_out(texts: Sequence[tuple[str, ...]], phrases: bool = False) -> tuple[list[int], list[int]]:
    """Choose some texts for validation, at random, of which training shows no part.

    texts: of each row one or two. phrases: whether they are parts of each other, as SST-2's are parts of its sentences.
    Returns the places of those for training, and of those for validation: `HELD_OUT` at most, and a tenth at most.

    Rows whose first text is the same are held out together, and training leaves out what has another text of theirs.
    Of phrases whole sentences are held out; a phrase that is also in a sentence of training is in neither part.
    """
    groups = _sentences([text for (text,) in texts]) if phrases else [[first] for first, *_ in texts]
    members: dict[str, list[int]] = defaultdict(list)
    for place, its in enumerate(groups):
        for group in its:
            members[group].append(place)
    most = min(HELD_OUT, len(texts) // 10)
    missing = [len(its) for its in groups]  # of each text's groups, those that are not held out
    validation: list[int] = []
    for group in random.Random(0).sample(list(members), len(members)):
        whole = [place for place in members[group] if missing[place] == 1]
        if len(validation) + len(whole) <= most:
            validation += whole
            for place in members[group]:
                missing[place] -= 1
    shown = {text for place in validation for text in texts[place]}
    train = [place for place, its in enumerate(texts) if missing[place] == len(groups[place]) and shown.isdisjoint(its)]
    return train, validation


def _sentences(phrases: Sequence[str]) -> list[list[str]]:
    """For each phrase the sentences it is a part of, word by word; a sentence is a phrase that is part of no other."""
    found: dict[str, list[str]] = {}
    phrases = [" ".join(phrase.split()) for phrase in phrases]
    known = set(phrases)
    for phrase in sorted(known, key=lambda phrase: (-phrase.count(" "), phrase)):
        if phrase in found:
            continue
        words = phrase.split()
        parts = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        for part in known.intersection(parts):
            found.setdefault(part, []).append(phrase)
    return [found[phrase] for phrase in phrases]


def write_task(name: str, parts: dict[str, Texts], path: Path) -> None:
    """Write a fetched task's file.

    name: a key of `FETCHED`. parts: as `read_task` gives them. path: the file.
    """
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(name, parts)), encoding="utf-8")


def _rows(name: str, parts: dict[str, Texts]) -> Iterator[dict[str, Any]]:
    labels = TASKS[name].labels
    for part, texts in parts.items():
        for (text,), label in zip(texts.texts, texts.labels, strict=True):
            yield {"part": part, "text": text, "label": labels[int(label)] if labels else label}


def score(metric: Metric, answers: ArrayLike, truth: ArrayLike) -> float:
    """Percent: the share of right answers, or the correlation of answers and truth.

    answers, truth: `(N,)`, classes by number or ratings. Matthews' correlation of two classes is Pearson's of their
    numbers 0 and 1. Answers that are all equal correlate with nothing: 0.
    """
    x, y = np.asarray(answers, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if metric == "accuracy":
        return 100 * float((x == y).mean())
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x * x).sum() * (y * y).sum())
    return 100 * float((x * y).sum() / size) if size else 0.0
