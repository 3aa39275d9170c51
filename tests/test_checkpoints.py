from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gsoft_diffusion.checkpoints import (
    ADAPTER,
    SETTINGS,
    STATE,
    check_settings,
    checkpoint_to_resume,
    checkpoints,
    read_state,
    write_checkpoint,
    write_settings,
)
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.errors import UserError

STATE_VALUES = {"step": 3, "adapter": {"a": torch.arange(3.0)}, "optimizer": {"state": {}, "lr": 1e-3}, "scaler": None}


@pytest.fixture
def config(tmp_path) -> TrainingConfig:
    return TrainingConfig("photos", class_word="dog", output_dir=str(tmp_path / "run")).resolved()


def save(folder: Path, step: int, limit: int | None = None, value: float = 0.0) -> Path:
    state = STATE_VALUES | {"step": step, "value": torch.tensor(value)}
    return write_checkpoint(folder, step, state, lambda path: path.write_text("adapter"), limit)


def test_state_round_trip(tmp_path):
    path = save(tmp_path, 3)
    assert path == tmp_path / "checkpoint-3"
    assert (path / ADAPTER).read_text() == "adapter"
    state = read_state(path)
    assert torch.equal(state["adapter"]["a"], torch.arange(3.0))
    assert state["optimizer"] == {"state": {}, "lr": 1e-3}


def test_order_is_by_step_and_incomplete_ones_do_not_count(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / STATE).touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_rotation(tmp_path, limit, kept):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, limit)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3, value=1.0)
    save(tmp_path, 3, value=2.0)
    assert read_state(tmp_path / "checkpoint-3")["value"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_failed_write_leaves_the_one_before(tmp_path):
    save(tmp_path, 3, limit=1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="checkpoint-4: No space left on device"):
        write_checkpoint(tmp_path, 4, STATE_VALUES, full, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    read_state(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_damaged_checkpoint_is_named(tmp_path, keep):
    path = save(tmp_path, 3) / STATE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="checkpoint-3: damaged"):
        read_state(tmp_path / "checkpoint-3")


def test_nothing_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    torch.save({"step": Evil()}, folder / STATE)
    with pytest.raises(UserError, match="damaged"):
        read_state(folder)
    assert not (tmp_path / "executed").exists()


def test_a_new_run_in_a_new_folder(config, tmp_path):
    assert checkpoint_to_resume(config) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert checkpoint_to_resume(config) is None


@pytest.mark.parametrize("trace", [SETTINGS, ADAPTER, f"checkpoint-5/{STATE}"])
def test_another_run_in_the_folder(config, tmp_path, trace):
    path = tmp_path / "run" / trace
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(UserError, match=r"another run.*--resume_from_checkpoint latest"):
        checkpoint_to_resume(config)


def test_a_folder_that_is_a_file(config, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"):
        checkpoint_to_resume(config)
    with pytest.raises(UserError, match="cannot be written"):
        write_settings(config)


def test_resume_where_there_is_nothing(config, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="checkpoint-7: is not"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint=str(tmp_path / "checkpoint-7")))


def test_resume_finds_the_latest_or_the_named_one(config, tmp_path):
    for step in (9, 10):
        save(tmp_path / "run", step)
    assert checkpoint_to_resume(replace(config, resume_from_checkpoint="latest")) == tmp_path / "run" / "checkpoint-10"
    named = tmp_path / "run" / "checkpoint-9"
    assert checkpoint_to_resume(replace(config, resume_from_checkpoint=str(named))) == named


def test_changed_settings_are_named(config, tmp_path):
    config = replace(config, learning_rate=2e-5)
    write_settings(config)
    checkpoint = save(tmp_path / "run", 9)
    check_settings(config, checkpoint)
    check_settings(replace(config, max_train_steps=5000, validation_prompts=("x",)), checkpoint)
    with pytest.raises(UserError, match=r"learning_rate is 0\.5 and was 2e-05"):
        check_settings(replace(config, learning_rate=0.5), checkpoint)
