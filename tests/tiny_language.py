"""A tiny encoder with random weights, and tiny tasks in the form of fetched ones."""

from __future__ import annotations

# isort: off
import examples.language  # noqa: F401 - first: it makes torchvision importable
# isort: on

import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from examples.language.tasks import FETCHED, Texts, write_task

WORDS = ("good", "fine", "nice", "bad", "poor", "dull", "film", "plot", "cast", "very", "so", "and", "the", "a")
WIDTH = 48  # a multiple of all methods' blocks: 2·8, 16, 3


def write_encoder(folder: Path) -> Path:
    """Write a BERT of two layers with its tokenizer, which knows `WORDS`."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=32,
        initializer_range=0.3,  # so that what is said of a text depends on its words
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def texts(count: int, seed: int, labels: int) -> Texts:
    """Texts of which every word tells the label, or the rating if there are no labels."""
    rng = random.Random(seed)
    found = Texts([], [])
    for _ in range(count):
        label = rng.randrange(labels or len(WORDS))
        words = WORDS[label::labels] if labels else (WORDS[label],)
        found.texts.append((" ".join(rng.choices(words, k=rng.randrange(2, 8))),))
        found.labels.append(float(label) if labels else label / 4)
    return found


def write_tasks(folder: Path) -> Path:
    """Write the four fetched tasks, with 64 texts to train on, 24 to validate and 30 to test."""
    for name, task in FETCHED.items():
        parts = {
            part: texts(count, seed, len(task.labels))
            for seed, (part, count) in enumerate({"train": 64, "validation": 24, "test": 30}.items())
        }
        write_task(name, parts, folder / f"{name}.jsonl")
    return folder
