from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tiny_language import WIDTH, texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig, RobertaModel, pipeline

import gsoft
from examples.language import adapter, merge, tasks, train
from examples.language.tasks import TASKS
from examples.language.training import load_model
from gsoft_diffusion.foundation.errors import UserError

TEXTS = ["good film and so", "bad plot", "the very dull cast"]


def call(module, monkeypatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, options)])
    return module.main()


@pytest.fixture(params=["gsoft", "double_gsoft"])
def folder(request, encoder, data_dir, tmp_path, monkeypatch, capsys) -> Path:
    """What the training command leaves."""
    out = tmp_path / "trained"
    options = ["--task", "sentiment", "--method", request.param, "--model", encoder, "--data_dir", data_dir]
    quick = ["--learning_rate", 2e-2, "--max_steps", 6, "--evaluations", 2, "--batch_size", 8, "--max_length", 12]
    assert call(train, monkeypatch, *options, *quick, "--output_dir", out) == 0
    assert re.search(r"numbers learned beside the head; best after [36] steps\naccuracy: ", capsys.readouterr().out)
    return out


def logits(model, tokenizer) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def test_one_file_has_rotations_and_head(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "result.json"]
    with safe_open(folder / "adapter.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert "modules_to_save.classifier.weight" in names
    assert "modules_to_save.bert.pooler.dense.weight" in names
    assert "model.bert.encoder.layer.1.attention.self.query.q_in" in names
    result = json.loads((folder / "result.json").read_text())
    assert result["run"]["task"] == "sentiment"


def test_it_answers_as_the_trained_model(folder):
    """On the test part, which the training command answered."""
    result = json.loads((folder / "result.json").read_text())
    model, tokenizer, loaded = adapter.load(folder / "adapter.safetensors")
    assert loaded.unchanged() == []
    model.eval()
    lines = (Path(result["run"]["data_dir"]) / "sentiment.jsonl").read_text().splitlines()
    tests = [row["text"] for row in map(json.loads, lines) if row["part"] == "test"]
    encoded = sorted(
        (tokenizer(text, truncation=True, max_length=12) for text in tests), key=lambda e: len(e["input_ids"])
    )
    with torch.no_grad():
        found = [int(model(torch.tensor([one["input_ids"]])).logits.argmax()) for one in encoded]
    assert found == result["answers"]


def test_the_merged_folder_runs_in_a_plain_pipeline(folder, tmp_path, monkeypatch):
    expected = logits(*adapter.load(folder / "adapter.safetensors")[:2])
    out = tmp_path / "merged"
    assert call(merge, monkeypatch, "--adapter", folder / "adapter.safetensors", "--output_dir", out) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(plain.bert.encoder.layer[0].attention.self.query) is torch.nn.Linear
    torch.testing.assert_close(logits(plain, AutoTokenizer.from_pretrained(out)), expected, atol=1e-5, rtol=1e-5)
    classify = pipeline("text-classification", str(out), top_k=None, function_to_apply="none", device="cpu")
    for text, row in zip(TEXTS, expected, strict=True):
        found = {one["label"]: one["score"] for one in classify([text])[0]}
        assert found == pytest.approx(dict(zip(TASKS["sentiment"].labels, row.tolist(), strict=True)), abs=1e-5)


def test_another_base_model_is_refused(folder, encoder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    torch.manual_seed(1)
    model, _ = load_model(str(encoder), TASKS["sentiment"])
    for parameter in model.bert.encoder.parameters():
        torch.nn.init.normal_(parameter)
    model.bert.save_pretrained(other)
    with pytest.raises(UserError, match="has other weights"):
        adapter.load(folder / "adapter.safetensors", str(other))


def test_a_base_model_with_a_head_of_its_own(encoder, data_dir, tmp_path, monkeypatch):
    """Its head is not used: neither for another number of classes, nor where the adapter is loaded again."""
    base, out = tmp_path / "base", tmp_path / "trained"
    model, tokenizer = load_model(str(encoder), TASKS["sentiment"])
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    options = ["--task", "topic", "--model", base, "--data_dir", data_dir, "--max_steps", 2, "--evaluations", 1]
    assert call(train, monkeypatch, *options, "--output_dir", out) == 0
    first, second = (logits(*adapter.load(out / "adapter.safetensors")[:2]) for _ in range(2))
    assert first.shape == (len(TEXTS), len(TASKS["topic"].labels))
    torch.testing.assert_close(first, second)


def test_other_files_are_refused(encoder, tmp_path):
    model, _ = load_model(str(encoder), TASKS["sentiment"])
    plain = gsoft.inject(model, gsoft.Config(target_modules=["query"], block_size=8, nfactors="dense"))
    for notes in ({}, {"task": "poetry"}, {"task": ["sentiment"]}):
        gsoft.save(plain, tmp_path / "adapter.safetensors", notes)
        with pytest.raises(UserError, match="has no task"):
            adapter.load(tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match="no such adapter file"):
        adapter.merge(tmp_path / "none", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_is_overwritten(encoder, data_dir, tmp_path, monkeypatch):
    options = ["--task", "sentiment", "--model", encoder, "--data_dir", data_dir, "--output_dir", tmp_path]
    with pytest.raises(UserError, match="exists and is not overwritten"):
        call(train, monkeypatch, *options)


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_roberta_on_glue(task, encoder, tmp_path, monkeypatch):
    """RoBERTa's architecture with random weights, on a stand-in for the hub: trained, merged, asked."""
    base = tmp_path / "roberta"
    shutil.copytree(encoder, base)  # for the tokenizer
    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
    RobertaModel(RobertaConfig(vocab_size=19, type_vocab_size=2, pad_token_id=0, **size)).save_pretrained(base)

    def load_dataset(path: str, name: str) -> dict[str, list[dict]]:
        made = texts(40, 0, 0 if name == "stsb" else 2)
        rows = [
            {**dict.fromkeys(TASKS[name].columns, text), "label": label}
            for (text,), label in zip(made.texts, made.labels, strict=True)
        ]
        return {"train": rows, "validation": rows[:10]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(tasks, "why_unreachable", lambda: None)
    quick = ["--learning_rate", 1e-2, "--max_steps", 2, "--evaluations", 1, "--batch_size", 8, "--max_length", 20]
    out = tmp_path / "trained"
    assert call(train, monkeypatch, "--task", task, "--model", base, *quick, "--output_dir", out) == 0
    adapter.merge(out / "adapter.safetensors", tmp_path / "merged")
    expected = logits(*adapter.load(out / "adapter.safetensors")[:2])
    classify = pipeline("text-classification", str(tmp_path / "merged"), function_to_apply="none", device="cpu")
    found = [one["score"] for one in classify(TEXTS)]
    assert found == pytest.approx(expected.amax(dim=1).tolist(), abs=1e-5)
