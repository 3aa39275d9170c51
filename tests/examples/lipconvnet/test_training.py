from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from examples.lipconvnet.network import Convolutions
from examples.lipconvnet.scores import accuracy
from examples.lipconvnet.training import Run, Settings, learning_rate, new_run, train
from gsoft_diffusion.foundation.errors import UserError

SETTINGS = Settings(Convolutions((4, 1)), width=8, epochs=3, batch_size=16, seed=1)


class StoppedError(Exception):
    pass


def equal(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_a_stopped_run_goes_on_as_if_it_had_not_been(pictures, tmp_path):
    whole = train(SETTINGS, pictures, tmp_path / "whole.pt")

    def stop(run: Run) -> None:
        torch.rand(7)  # whatever else draws random numbers
        raise StoppedError

    for _ in range(2):
        with pytest.raises(StoppedError):
            train(SETTINGS, pictures, tmp_path / "stopped.pt", stop)
    resumed = train(SETTINGS, pictures, tmp_path / "stopped.pt")
    assert equal(resumed.network.state_dict(), whole.network.state_dict())
    assert equal(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert equal(resumed.best, whole.best)
    for mine, its in zip(resumed.history, whole.history, strict=True):
        assert (mine["loss"], mine["validation_accuracy"]) == (its["loss"], its["validation_accuracy"])


def test_it_learns(pictures, tmp_path):
    run = train(replace(SETTINGS, epochs=6), pictures, tmp_path / "run.pt")
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert accuracy(run.best_network(), pictures.test) == 1


def test_the_first_best_epoch_on_the_validation_part_is_kept(pictures, tmp_path, monkeypatch):
    given = iter([0.2, 0.6, 0.6])
    monkeypatch.setattr("examples.lipconvnet.training.accuracy", lambda network, part: next(given))
    states = []

    def keep(run: Run) -> None:
        states.append({name: value.clone() for name, value in run.network.state_dict().items()})

    run = train(SETTINGS, pictures, tmp_path / "run.pt", keep)
    assert run.best_epoch == 1
    assert equal(run.best, states[1])
    assert equal(run.best_network().state_dict(), states[1])
    assert not equal(states[1], states[2])


def test_the_learning_rate_falls_twice():
    settings = replace(SETTINGS, epochs=8)
    assert [learning_rate(settings, epoch) for epoch in range(8)] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_a_checkpoint_of_other_settings_or_of_no_run(pictures, tmp_path):
    path = tmp_path / "run.pt"
    run = new_run(SETTINGS, pictures)
    run.save(path)
    with pytest.raises(
        UserError, match=r"run\.pt was trained with other settings \(width, epochs\); give another --out"
    ):
        train(replace(SETTINGS, width=16, epochs=4), pictures, path)
    with pytest.raises(UserError, match=r"other settings \(convolutions\)"):
        train(replace(SETTINGS, convolutions=Convolutions((4, 1), paired=False)), pictures, path)
    other = replace(pictures, training=replace(pictures.training, labels=pictures.training.labels.flip(0)))
    with pytest.raises(UserError, match=r"other settings \(pictures\)"):
        train(SETTINGS, other, path)
    content = torch.load(path)
    for change in (
        {"settings": None},
        {"network": {}},
        {"optimizer": {}},
        {"history": None},
        {"history": [{"validation_accuracy": 0.5}], "best": {"1.free": torch.zeros(1)}},
    ):
        torch.save(content | change, path)
        with pytest.raises(UserError, match=r"run\.pt is no checkpoint of this program"):
            train(SETTINGS, pictures, path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"run\.pt is no checkpoint of this program"):
        train(SETTINGS, pictures, path)
    assert path.read_bytes() == b"nothing"
