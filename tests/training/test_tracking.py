"""What trackers are told."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.training.train import train


def test_tensorboard_gets_loss_rate_and_pictures(config):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(config, report_to="tensorboard", num_validation_images=1, validation_steps=2)
    folder = train(config).adapter.parent / "logs" / "training"
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([1e-2] * 4)
    assert [event.step for event in events.Images("validation")] == [2, 4]


@pytest.mark.parametrize("method", ["init_trackers", "log", "end_training"])
def test_a_tracker_that_cannot_write_does_not_end_the_run(config, monkeypatch, capfd, method):
    calls = []

    def full(*arguments, **options):
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"accelerate.Accelerator.{method}", full)
    assert train(replace(config, report_to="tensorboard")).steps == 4
    assert calls
    noted = "note: tensorboard cannot write ([Errno 28] No space left on device)" in capfd.readouterr().out
    assert noted == (method != "end_training")


@pytest.mark.filterwarnings("ignore:.*no supported trackers:UserWarning")
def test_a_tracker_that_is_not_installed_is_said(config, capfd, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.is_tensorboard_available", lambda: False)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    train(replace(config, report_to="tensorboard"))
    assert "pip install tensorboard" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("report_to", "missing"), [("tensorboard, wandb", ["wandb"]), ("TensorBoard", []), ("comet_ml,none", None)]
)
def test_several_trackers(config, capfd, report_to, missing):
    pytest.importorskip("tensorboard")
    if missing is None:
        with pytest.raises(UserError, match="--report_to comet_ml,none: none, and others"):
            train(replace(config, report_to=report_to))
        return
    folder = train(replace(config, report_to=report_to)).adapter.parent
    assert list((folder / "logs" / "training").iterdir())
    noted = [line for line in capfd.readouterr().out.splitlines() if "is not installed" in line]
    assert [line.split()[1] for line in noted] == [name for name in missing if not importlib.util.find_spec(name)]


def test_a_service_that_refuses_does_not_end_the_run(config, monkeypatch, capfd):
    def refused(*arguments, **options):
        raise ValueError("no API key")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refused)
    assert train(replace(config, report_to="tensorboard")).steps == 4
    assert "note: tensorboard cannot write (no API key); nothing more is reported to it" in capfd.readouterr().out
