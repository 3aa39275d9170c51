from __future__ import annotations

import json
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
    values = {column: f"{column}" for column in FROM_GLUE[name].columns}
    return [{**values, "label": number % 2, "idx": number} for number in range(count)]


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
    assert parts["train"].texts[0] == TASKS[name].columns
    assert set(parts["train"].labels) == {0.0, 1.0}


def test_glue_without_a_network_or_its_library(monkeypatch):
    def load_dataset(path: str, task: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"no route to host.*use a task of python -m examples\.language\.fetch"):
        read_task("rte", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        read_task("rte", None)
