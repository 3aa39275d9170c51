from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from examples.lipconvnet import train
from examples.lipconvnet.pictures import world_pictures
from gsoft_diffusion.foundation.errors import UserError

QUICK = "--training 32 --held_out 10 --depth 5 --width 8 --batch_size 16 --epochs 1 --groups 4,4"


def run(monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *QUICK.split(), *options])
    return train.main()


def test_writes_a_checkpoint_scores_and_a_program(things, tmp_path, monkeypatch, capsys):
    pytest.importorskip("foolbox", reason="of the extra lipconvnet")
    out = tmp_path / "out"
    options = ["--folder", str(things), "--out", str(out), "--attacked", "5", "--attack_steps", "2"]
    assert run(monkeypatch, *options) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["test"]["attacked"] == 5
    assert scores["test"]["beaten"] == 0
    assert len(scores["history"]) == 1
    assert re.search(r"\(4,4\): accuracy .*%, certified .*%, under attack .*% of 5; epoch 1;", capsys.readouterr().out)
    program = torch.export.load(out / "network.pt2").module()
    test = world_pictures(things, 0, 32, 10).test
    right = program(test.pictures.float() / 255).argmax(1) == test.labels
    assert float(right.double().mean()) == scores["test"]["accuracy"]
    assert run(monkeypatch, *options) == 0  # nothing is left to train
    assert json.loads((out / "scores.json").read_text()) == scores
    with pytest.raises(UserError, match=r"checkpoint\.pt was trained with other settings \(learning_rate\)"):
        run(monkeypatch, *options, "--learning_rate", "0.2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--groups", "four"], "'four' is not soc, a,- or a,b with numbers a and b"),
        (["--width", "0"], "0 is less than 1"),
        (["--learning_rate", "-1"], "--learning_rate: -1 is not a number above 0"),
        (["--learning_rate", "abc"], "--learning_rate: abc is not a number above 0"),
        (["--learning_rate", "nan"], "--learning_rate: nan is not a number above 0"),
    ],
)
def test_values_that_flags_do_not_take(options, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--folder", str(tmp_path), "--out", str(tmp_path), *options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_an_attack_nothing_is_said_of_one(things, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--folder", str(things), "--out", str(tmp_path / "out"), "--attacked", "0") == 0
    assert re.search(r"\(4,4\): accuracy .*%, certified \d+\.\d%; epoch 1;", capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["test"]["attacked_accuracy"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--groups soc --not_paired", "--not_paired would have no effect: --groups soc shuffles no channels"),
        ("--data cifar100", "--training would have no effect: CIFAR-100 has its own numbers; leave it out"),
        ("--data cifar100 --training 20000", "--held_out would have no effect: CIFAR-100 has its own numbers"),
        ("--attacked 0 --attack_steps 7", "--attack_steps would have no effect: --attacked 0 attacks nothing"),
    ],
)
def test_flags_without_effect_are_refused(options, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"^{message}"):
        run(monkeypatch, "--folder", "none", "--out", str(tmp_path / "out"), *options.split())
    assert not (tmp_path / "out").exists()


def test_a_network_that_does_not_fit_is_refused_before_pictures_are_drawn(tmp_path, monkeypatch):
    options = ["--folder", "none", "--out", str(tmp_path / "out"), "--attacked", "0"]
    with pytest.raises(UserError, match="--depth 7 is not a multiple of 5"):
        run(monkeypatch, *options, "--depth", "7")
    with pytest.raises(UserError, match=r"--width or --groups does not fit: GSConv2d\(16, 32.* 3 groups"):
        run(monkeypatch, *options, "--groups", "3,-")


def test_more_pictures_in_a_batch_than_there_are(things, tmp_path, monkeypatch):
    options = ["--folder", str(things), "--out", str(tmp_path / "out"), "--attacked", "0", "--batch_size", "64"]
    with pytest.raises(UserError, match="--batch_size 64 is more than the 32 training pictures"):
        run(monkeypatch, *options)
    assert not (tmp_path / "out").exists()
