from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_language import WIDTH, texts
from transformers import AutoModelForSequenceClassification, TrainerControl, TrainerState, set_seed

from examples.language import training
from examples.language.methods import METHODS
from examples.language.tasks import TASKS, Texts, read_task, score
from examples.language.training import Best, DivergedError, Run, Trained, encode, load_model, train
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.hub_access import stay_offline


@pytest.fixture
def run(encoder, data_dir) -> Run:
    return Run(
        "sentiment",
        model=str(encoder),
        data_dir=str(data_dir),
        learning_rate=2e-2,
        max_steps=12,
        evaluations=3,
        batch_size=8,
        max_length=12,
    )


def trained(run: Run) -> Trained:
    return train(run, read_task(run.task, run.data_dir), progress=False)


def test_a_seed_that_is_too_large_is_refused(run):
    replace(run, seed=2**32 - 1)
    with pytest.raises(UserError, match="--seed 4294967296: must be less than 2³²"):
        replace(run, seed=2**32)


def logits_of(result: Trained, run: Run, part: str) -> np.ndarray:
    """The logits `(N, C)` that the model gives now, computed here."""
    task = TASKS[run.task]
    rows = encode(read_task(run.task, run.data_dir)[part], task, result.tokenizer, run.max_length)
    result.adapted.eval()
    with torch.no_grad():
        found = [result.adapted(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in rows]
    return np.array(found)


@pytest.mark.parametrize("task", ["sentiment", "rating", "topic", "acceptability"])
def test_every_kind_of_task(run, task):
    run = replace(run, task=task)
    result = trained(run)
    assert [step for step, _ in result.scores["curve"]] == [4, 8, 12]
    assert result.scores["validation"] == max(value for _, value in result.scores["curve"])
    found = training.answers(TASKS[task], logits_of(result, run, "test"))
    np.testing.assert_allclose(found, result.scores["answers"], atol=2e-4)
    expected = score(TASKS[task].metric, result.scores["answers"], result.scores["truth"])
    assert result.scores["test"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("evaluations", "steps"), [(5, [3, 5, 8, 10, 12]), (8, [2, 3, 5, 6, 8, 9, 11, 12])])
def test_the_validation_part_is_answered_as_often_as_asked_for(run, evaluations, steps):
    assert [step for step, _ in trained(replace(run, evaluations=evaluations)).scores["curve"]] == steps


def test_of_several_gpus_one_is_used(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, count in (("cuda", 1), ("cpu", 0)):
        monkeypatch.setattr(training, "training_device", lambda device=device: torch.device(device))
        arguments = training._arguments(run, str(tmp_path), progress=False)
        assert arguments.n_gpu == count
        assert (arguments.train_batch_size, arguments.eval_batch_size) == (8, 16)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(run, method):
    """The words tell the class; whoever learns nothing is right in about half of the cases."""
    run = replace(run, method=method, max_steps=32, batch_size=32, learning_rate=1e-2)
    assert trained(run).scores["validation"] > 75


def test_the_best_step_is_what_is_kept(run, monkeypatch):
    """Told that the second of three steps is best, a training ends with the weights of that step."""
    told, logits = [50.0, 70.0, 60.0, 40.0], []  # three of the validation part, then the test part

    def score_told(task, prediction) -> float:
        logits.append(prediction.predictions)
        return told[len(logits) - 1]

    monkeypatch.setattr(training, "task_score", score_told)
    result = trained(run)
    expected = {"curve": [(4, 50.0), (8, 70.0), (12, 60.0)], "best_step": 8, "validation": 70.0, "test": 40.0}
    assert result.scores.items() >= expected.items()
    # Texts are evaluated in an order of their own: so columns are sorted.
    second, last, kept = (np.sort(each, axis=0) for each in (*logits[1:3], logits_of(result, run, "validation")))
    np.testing.assert_allclose(kept, second, atol=1e-4)
    assert np.abs(kept - last).max() > 1e-2


def test_a_run_can_be_repeated(run):
    first, second = trained(run), trained(run)
    assert first.scores == second.scores
    assert trained(replace(run, seed=1)).scores["curve"] != first.scores["curve"]


def test_bfloat16_leaves_what_is_learned_in_float32(run):
    result = trained(replace(run, bf16=True))
    learned = [parameter for parameter in result.adapted.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in learned} == {torch.float32}


def test_of_equal_scores_the_earliest_counts():
    best, model = Best(), torch.nn.Linear(1, 1)
    state = TrainerState()
    for step, value in ((1, 50.0), (2, 70.0), (3, 70.0), (4, math.nan)):
        state.global_step = step
        torch.nn.init.constant_(model.weight, step)
        best.on_evaluate(None, state, TrainerControl(), metrics={"eval_score": value}, model=model)
    best.restore(model)
    assert (best.step, model.weight.item()) == (2, 2.0)


def test_a_diverging_training_is_refused(run):
    with pytest.raises(DivergedError, match=r"--learning_rate 1e\+38: the training diverged"):
        trained(replace(run, task="rating", method="full", learning_rate=1e38, max_steps=4, evaluations=1))


def test_texts_are_cut_and_sorted(encoder):
    _, tokenizer = load_model(str(encoder), TASKS["topic"])
    rows = encode(texts(20, 0, 2), TASKS["sentiment"], tokenizer, 5)
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 5
    assert {type(row["labels"]) for row in rows} == {int}


def test_two_texts_are_told_apart(encoder):
    _, tokenizer = load_model(str(encoder), TASKS["rte"])
    (row,) = encode(Texts([("good film", "bad plot")], [1.0]), TASKS["rte"], tokenizer, 12)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] good film [SEP] bad plot [SEP]"
    assert row["labels"] == 1


def test_the_head_knows_the_names_of_the_classes(encoder):
    model, _ = load_model(str(encoder), TASKS["acceptability"])
    assert model.config.id2label == {0: "unacceptable", 1: "acceptable"}
    rating, _ = load_model(str(encoder), TASKS["rating"])
    assert rating.classifier.weight.shape == (1, WIDTH)


def states(name: str, task: str, seed: int) -> tuple[dict, dict]:
    """What a model is loaded with for a task: of its encoder, and of its head."""
    set_seed(seed)
    model, _ = load_model(name, TASKS[task])
    assert not model.training
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    head = {key: state.pop(key) for key in list(state) if not key.startswith("bert.")}
    return state, head


def test_the_head_is_new_where_the_checkpoint_has_one(encoder, tmp_path):
    """Of as many classes or of others; and as before where it has none."""
    set_seed(5)
    tuned = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    tuned.save_pretrained(tmp_path)
    shutil.copy(encoder / "tokenizer.json", tmp_path)
    shutil.copy(encoder / "tokenizer_config.json", tmp_path)
    for task in ("sentiment", "topic", "rating"):
        state, head = states(str(tmp_path), task, seed=0)
        assert all(torch.equal(state[key], tensor) for key, tensor in states(str(encoder), task, seed=0)[0].items())
        assert head["classifier.weight"].shape == (len(TASKS[task].labels) or 1, WIDTH)
        assert head["classifier.weight"].std() > 0.1
        assert not torch.equal(head["classifier.weight"][:1], tuned.classifier.weight[:1])
        assert torch.equal(head["classifier.weight"], states(str(tmp_path), task, seed=0)[1]["classifier.weight"])
        assert not torch.equal(head["classifier.weight"], states(str(tmp_path), task, seed=1)[1]["classifier.weight"])


def test_weights_that_are_not_of_the_config_are_refused(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))
    with pytest.raises(UserError, match=r"model: bert\.encoder\..* has another shape than its config\.json says"):
        load_model(str(tmp_path / "model"), TASKS["sentiment"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "poetry"}, "--task poetry: choose from"),
        ({"method": "prompt"}, "--method prompt: choose from"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"evaluations": 13}, r"--evaluations 13: must be --max_steps \(12\) or less"),
    ],
)
def test_settings_that_cannot_be(run, settings, message):
    with pytest.raises(UserError, match=message):
        replace(run, **settings)


def test_a_model_that_is_not_there(run, tmp_path, monkeypatch):
    """Neither as a folder nor on the hub, which does not answer."""

    def unreachable() -> str:
        stay_offline()
        return "the hub does not answer"

    monkeypatch.setattr(training, "why_unreachable", unreachable)
    with pytest.raises(UserError, match=r"cannot be loaded \(.*does not answer.*examples\.language\.fetch"):
        trained(replace(run, model="nobody/nothing"))
    with pytest.raises(UserError, match=r"cannot be loaded.*examples\.language\.fetch"):
        trained(replace(run, model=str(tmp_path)))


def test_a_damaged_model(run, encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"--model .* cannot be loaded"):
        trained(replace(run, model=str(tmp_path / "model")))
