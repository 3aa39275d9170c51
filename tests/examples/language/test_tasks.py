from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from examples.language import tasks
from examples.language.tasks import FROM_GLUE, TASKS, Texts, read_task, score, write_task
from gsoft_diffusion.foundation.errors import UserError


def test_matthews_is_that_of_the_confusion_matrix():
    truth = np.array([1] * 50 + [0] * 30)
    answers = np.array([1] * 40 + [0] * 10 + [0] * 24 + [1] * 6)
    right, missed, left, wrong = 40, 10, 24, 6
    expected = (right * left - wrong * missed) / np.sqrt(
        (right + wrong) * (right + missed) * (left + wrong) * (left + missed)
    )
    assert score("matthews", answers, truth) == pytest.approx(100 * expected)


def test_accuracy_and_pearson():
    assert score("accuracy", [0, 1, 2, 2], [0, 1, 1, 2]) == 75
    assert score("pearson", [1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx(100)
    assert score("pearson", [1.0, 2.0, 4.0], [-2.0, -4.0, -8.0]) == pytest.approx(-100)
    assert score("pearson", [3.0, 3.0, 3.0], [1.0, 2.0, 3.0]) == 0


def test_a_task_is_read_as_it_was_written(tmp_path):
    parts = {
        "train": Texts([("one\u0085text",), ("two",)], [1.0, 0.0]),
        "validation": Texts([("three",)], [0.0]),
        "test": Texts([("four",)], [1.0]),
    }
    write_task("sentiment", parts, tmp_path / "sentiment.jsonl")
    assert '"label": "positive"' in (tmp_path / "sentiment.jsonl").read_text()
    assert read_task("sentiment", str(tmp_path)) == parts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"part": "train", "text": "x", "label": "odd"}', "line 2: is not a text of this task"),
        ('{"part": "dev", "text": "x", "label": "positive"}', "line 2: is not a text of this task"),
        ('{"part": "train", "text": 3, "label": "positive"}', "line 2: is not a text of this task"),
        ("[]", "line 2: is not a text of this task"),
        ('{"part": "train", "text": "x", "label": "positive"}', "has no texts for validation, test"),
    ],
)
def test_lines_that_are_no_texts_are_refused(tmp_path, line, message):
    first = json.dumps({"part": "train", "text": "fine", "label": "positive"})
    (tmp_path / "sentiment.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_task("sentiment", str(tmp_path))


def test_a_rating_must_be_finite(tmp_path):
    (tmp_path / "rating.jsonl").write_text('{"part": "train", "text": "x", "label": NaN}\n')
    with pytest.raises(UserError, match="line 1"):
        read_task("rating", str(tmp_path))


def test_a_fetched_task_needs_its_folder(tmp_path):
    with pytest.raises(UserError, match="--task topic needs --data_dir"):
        read_task("topic", None)
    with pytest.raises(UserError, match=r"topic\.jsonl"):
        read_task("topic", str(tmp_path))


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """As if the hub answered."""
    monkeypatch.setattr(tasks, "why_unreachable", lambda: None)


def rows(count: int, name: str) -> list[dict]:
    columns = FROM_GLUE[name].columns
    return [
        {column: f"{column} {number}" for column in columns} | {"label": number % 2, "idx": number}
        for number in range(count)
    ]


@pytest.mark.parametrize(("name", "own"), [("cola", "validation"), ("mnli", "validation_matched")])
def test_glue_is_split_so_that_its_validation_part_is_the_test(monkeypatch, name, own):
    asked = []

    def load_dataset(path: str, task: str) -> dict[str, list]:
        asked.append((path, task))
        return {"train": rows(50, name), own: rows(7, name), "test": rows(3, name)}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    parts = read_task(name, None)
    assert asked == [("nyu-mll/glue", name)]
    assert {part: len(texts.texts) for part, texts in parts.items()} == {"train": 45, "validation": 5, "test": 7}
    assert parts["test"].texts[3] == tuple(f"{column} 3" for column in TASKS[name].columns)
    assert parts["test"].labels == [0, 1, 0, 1, 0, 1, 0]
    both = [*zip(*parts["train"], strict=True), *zip(*parts["validation"], strict=True)]
    expected = [(tuple(row[column] for column in TASKS[name].columns), row["label"]) for row in rows(50, name)]
    assert sorted(both) == sorted(expected)


def split_of(name: str, texts: list[tuple[str, ...]], monkeypatch) -> tuple[list, list]:
    """What a task of GLUE with these texts trains on, and is validated on."""
    columns = FROM_GLUE[name].columns
    table = [{**dict(zip(columns, row, strict=True)), "label": 0} for row in texts]
    tables = {"train": table, "validation": table[:1], "validation_matched": table[:1]}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda path, task: tables))
    parts = read_task(name, None)
    return parts["train"].texts, parts["validation"].texts


@pytest.mark.parametrize("name", ["mnli", "qnli", "qqp"])
def test_no_text_of_a_pair_is_in_both_parts(name, monkeypatch):
    """Three rows share the first text, and some the second one, with rows of other first texts or with a first text."""
    pairs = [(f"first {row // 3}", f"second {row % 250}" if row % 10 else f"first {row // 10}") for row in range(300)]
    random.Random(1).shuffle(pairs)
    train, validation = split_of(name, pairs, monkeypatch)
    assert len(validation) == 30
    assert all(pairs.count(pair) == validation.count(pair) for pair in pairs if pair[0] in dict(validation))
    assert not {text for pair in train for text in pair} & {text for pair in validation for text in pair}
    assert len(train) > 240


def test_no_phrase_in_training_is_a_part_of_a_held_out_one_or_the_reverse(monkeypatch):
    rng = random.Random(1)
    words = [f"w{number}" for number in range(400)]
    phrases = []
    for _ in range(80):
        sentence = rng.choices(words, k=rng.randrange(5, 20))
        starts = [rng.randrange(len(sentence)) for _ in range(9)]
        parts = (sentence[start : start + rng.randrange(1, 9)] for start in starts)
        phrases += [" ".join(part) + " " for part in (sentence, *parts)]
    phrases = list(dict.fromkeys(phrases))
    rng.shuffle(phrases)
    train, validation = split_of("sst2", [(phrase,) for phrase in phrases], monkeypatch)
    padded = [[f" {phrase}" for (phrase,) in part] for part in (train, validation)]
    assert [(one, other) for one in padded[0] for other in padded[1] if one in other or other in one] == []
    assert 0.08 * len(phrases) < len(validation) <= 0.1 * len(phrases)
    assert len(train) > 0.75 * len(phrases)


def test_phrases_are_parts_of_each_other_by_words_not_by_letters(monkeypatch):
    phrases = [(f"party {number} ",) for number in range(10)] + [("art ",), ("party ",)] + [("par",)] * 7
    train, validation = split_of("sst2", phrases, monkeypatch)
    assert len(validation) == 1
    assert ("party ",) not in train + validation  # which is in a sentence of training and in a held-out one
    assert sorted(train + validation) == sorted(phrase for phrase in phrases if phrase != ("party ",))


def test_glue_without_a_network_or_its_library(monkeypatch):
    def load_dataset(path: str, task: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        UserError,
        match=r"glue cannot be downloaded from the hub \(no route to host.*task of python -m examples\.language\.fetch",
    ):
        read_task("rte", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        read_task("rte", None)
