from __future__ import annotations

import re
import resource
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from other_process import held

from gsoft_diffusion.config import Concept, TrainingConfig
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import ADAPTER, PROGRESS, SETTINGS, checkpoint_name, run_folder
from gsoft_diffusion.training.checkpoints import (
    STATE,
    SUMS,
    check_goes_further,
    check_unchanged,
    checkpoint_to_resume,
    checkpoints,
    damage_of,
    output_folder,
    read_state,
    recorded,
    write_checkpoint,
    write_settings,
)

STATE_VALUES = {"step": 3, "adapter": {"a": torch.arange(3.0)}, "optimizer": {"state": {}, "lr": 1e-3}, "scaler": None}


@pytest.fixture
def config(tmp_path) -> TrainingConfig:
    return TrainingConfig("photos", class_word="dog", output_dir=str(tmp_path / "run")).resolved()


def save(folder: Path, step: int, limit: int | None = None, value: float = 0.0) -> Path:
    state = STATE_VALUES | {"step": step, "value": torch.tensor(value)}
    return write_checkpoint(folder, step, state, lambda path: path.write_text("adapter"), limit)


def test_rotation_keeps_what_the_run_has_not_written(tmp_path):
    save(tmp_path, 1)
    mine = tmp_path / "checkpoint-1" / "images" / "dog.png"
    mine.parent.mkdir()
    mine.write_text("precious")
    for step in (2, 3):
        save(tmp_path, step, limit=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert [path for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()] == [mine]


def test_a_damaged_checkpoint_is_replaced_around_what_the_run_has_not_written(tmp_path):
    folder = save(tmp_path, 3)
    (folder / SUMS).unlink()
    (folder / "notes.txt").write_text("precious")
    save(tmp_path, 3, value=2.0)
    assert damage_of(folder) is None
    assert read_state(folder)["value"] == 2.0
    assert (folder / "notes.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_which_run_an_adapter_is_of(tmp_path, monkeypatch):
    inside = save(tmp_path, 3) / ADAPTER
    assert (run_folder(inside), checkpoint_name(inside)) == (inside.parent, "")  # a copy of a checkpoint alone
    (tmp_path / SETTINGS).touch()
    assert (run_folder(inside), checkpoint_name(inside)) == (tmp_path, "checkpoint-3")
    assert (run_folder(tmp_path / ADAPTER), checkpoint_name(tmp_path / ADAPTER)) == (tmp_path, "")
    monkeypatch.chdir(inside.parent)
    assert run_folder(Path(ADAPTER)) == tmp_path


@pytest.mark.parametrize(
    ("result", "checkpoint", "steps", "message"),
    [
        (0, 3, 4, None),
        (4, 3, 4, None),  # trained again, to the same step
        (6, 3, 5, r"--max_train_steps 5: .* was trained 6 steps and would be replaced by less; give 6 or more"),
        (4, 4, 4, r"--max_train_steps 4: the checkpoint has 4 steps, so nothing is left to train.*more than 4"),
        (0, 4, 4, None),  # killed before the result was written
        (0, 5, 4, "nothing is left to train"),
    ],
)
def test_a_run_that_would_do_nothing_or_less(config, tmp_path, monkeypatch, result, checkpoint, steps, message):
    monkeypatch.setattr("gsoft_diffusion.training.checkpoints.step_of_result", lambda folder: result)
    save(tmp_path / "run", checkpoint)
    (tmp_path / "run" / "README.md").touch()
    config = replace(config, max_train_steps=steps, num_validation_images=0)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_goes_further(config, checkpoint)
    if result == steps == checkpoint:  # what was missing is written
        check_goes_further(replace(config, num_validation_images=1), checkpoint)
        check_goes_further(replace(config, push_to_hub=True), checkpoint)


def test_a_checkpoint_elsewhere_that_has_all_steps(config, tmp_path):
    with pytest.raises(UserError, match="nothing is left to train"):
        check_goes_further(replace(config, max_train_steps=4, output_dir=str(tmp_path / "new")), 4)


def test_state_round_trip(tmp_path):
    path = save(tmp_path, 3)
    assert path == tmp_path / "checkpoint-3"
    assert (path / ADAPTER).read_text() == "adapter"
    state = read_state(path)
    assert torch.equal(state["adapter"]["a"], torch.arange(3.0))
    assert state["optimizer"] == {"state": {}, "lr": 1e-3}


def test_order_is_by_step_and_other_names_do_not_count(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_the_checksums_are_those_of_sha256sum(tmp_path):
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=save(tmp_path, 3), check=True, capture_output=True)


DAMAGE = {
    "torn": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "one bit": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "missing": lambda file: file.unlink(),
    "not text": lambda file: file.write_bytes(b"\xff\xfe"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", [STATE, ADAPTER, SUMS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_latest_is_the_newest_that_is_sound_and_says_so(config, tmp_path, name, damage):
    for step in (9, 10):
        save(tmp_path / "run", step)
    DAMAGE[damage](tmp_path / "run" / "checkpoint-10" / name)
    said = []
    assert checkpoint_to_resume(replace(config, resume_from_checkpoint="latest"), said.append).name == "checkpoint-9"
    assert len(said) == 1
    assert "checkpoint-10 is damaged (" in said[0]
    assert "continuing from checkpoint-9" in said[0]
    with pytest.raises(UserError, match="checkpoint-10: damaged"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10")))


def test_no_checkpoint_is_sound(config, tmp_path):
    for step in (9, 10):
        (save(tmp_path / "run", step) / STATE).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no checkpoint is sound.*checkpoint-10.*checkpoint-9"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint="latest"))


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


@pytest.mark.parametrize(
    ("damaged", "limit", "kept"), [([3], 1, [4]), ([2, 3], 2, [1, 2, 3, 4]), ([3], 2, [2, 3, 4]), ([1], 3, [2, 3, 4])]
)
def test_damaged_ones_do_not_count_in_rotation(tmp_path, damaged, limit, kept):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in damaged:
        (tmp_path / f"checkpoint-{step}" / STATE).write_bytes(b"x")
    save(tmp_path, 4, limit)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_the_one_before_is_kept_if_what_was_written_does_not_come_back(tmp_path, monkeypatch):
    """A disk that lies: rotation reads before it deletes."""
    save(tmp_path, 3, limit=1)
    rename = Path.replace

    def torn(self, target):
        if self.name.startswith(".checkpoint-4"):
            (self / STATE).write_bytes((self / STATE).read_bytes()[:-100])
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", torn)
    save(tmp_path, 4, limit=1)
    assert damage_of(tmp_path / "checkpoint-4")
    assert damage_of(tmp_path / "checkpoint-3") is None


def test_a_failed_write_leaves_the_one_before(tmp_path):
    save(tmp_path, 3, limit=1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="checkpoint-4: No space left on device"):
        write_checkpoint(tmp_path, 4, STATE_VALUES, full, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    read_state(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("size", [100, 1_000, 10_000, 100_000, 399_000])
def test_what_stops_a_write_is_named_whatever_torch_says(tmp_path, size):
    save(tmp_path, 3, limit=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # writes really fail from there
    try:
        with pytest.raises(UserError, match=r"cannot write .*checkpoint-4: File too large; earlier .* intact"):
            write_checkpoint(tmp_path, 4, {"value": torch.zeros(100_000)}, lambda path: path.touch(), limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(tmp_path):
    save(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise UserError(f"cannot write {path.name}: No space left on device")

    with pytest.raises(
        UserError, match=r"cannot write .*checkpoint-2: cannot write .*; earlier checkpoints are intact"
    ):
        write_checkpoint(tmp_path, 2, STATE_VALUES, refuse, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_settings_say_what_a_run_depends_on_and_can_be_read_again(config, tmp_path):
    (tmp_path / "run").mkdir()
    path = write_settings(config, processes=2)
    assert re.match(r"# python 3\.\S+, torch \S+, .*; processes: 2\n", path.read_text())
    assert TrainingConfig.from_dict(read_yaml(path)) == recorded(config)


def test_recorded_settings_mean_the_same_from_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mini").mkdir(parents=True)
    concepts = (Concept("dogs/", "dog"), Concept("../mugs", "mug", "zwx", class_data_dir="all"))
    kept = recorded(
        TrainingConfig(concepts_list=concepts, output_dir="out", pretrained_model_name_or_path="models/mini")
    )
    assert [one.instance_data_dir for one in kept.concepts] == [str(tmp_path / "dogs"), str(tmp_path.parent / "mugs")]
    assert kept.concepts[1].class_data_dir == str(tmp_path / "all")
    assert (kept.output_dir, kept.pretrained_model_name_or_path) == (
        str(tmp_path / "out"),
        str(tmp_path / "models/mini"),
    )
    for name in ("data/mini_base", "ann/on-the-hub"):
        other = TrainingConfig("photos", class_word="dog", pretrained_model_name_or_path=name)
        assert recorded(other).pretrained_model_name_or_path == name


@pytest.mark.parametrize("spelling", ["photos/", "./photos", "there/../photos", "{}/photos"])
def test_another_spelling_of_a_path_is_no_change(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    before, now = (
        recorded(
            TrainingConfig(folder, class_word="dog", class_data_dir=folder, with_prior_preservation=True)
        ).to_dict()
        for folder in ("photos", spelling.format(tmp_path))
    )
    check_unchanged(TrainingConfig("photos", class_word="dog"), Path("checkpoint-9"), before, now)
    other = recorded(TrainingConfig("others", class_word="dog")).to_dict()
    with pytest.raises(UserError, match=r"instance_data_dir is .*others and was .*photos"):
        check_unchanged(TrainingConfig("photos", class_word="dog"), Path("checkpoint-9"), before, other)


def test_nothing_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    torch.save({"step": Evil()}, folder / STATE)
    with pytest.raises(UserError, match="cannot be loaded"):
        read_state(folder)
    assert not (tmp_path / "executed").exists()


def test_a_new_run_in_a_new_folder(config, tmp_path):
    assert checkpoint_to_resume(config) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert checkpoint_to_resume(config) is None
    write_settings(config)  # as a run whose first step did not fit into memory
    assert checkpoint_to_resume(config) is None


@pytest.mark.parametrize(
    ("trace", "advice"),
    [
        (PROGRESS, "--resume_from_checkpoint latest"),
        ("validation/step-000000.png", "--resume_from_checkpoint latest"),
        (ADAPTER, "choose another folder"),
        (f"checkpoint-5/{STATE}", "--resume_from_checkpoint latest"),
    ],
)
def test_another_run_in_the_folder(config, tmp_path, trace, advice):
    path = tmp_path / "run" / trace
    path.parent.mkdir(parents=True)
    path.touch()
    write_settings(config)
    with pytest.raises(UserError, match=rf"another run.*{advice}"):
        checkpoint_to_resume(config)
    other = save(tmp_path / "other", 3)
    with pytest.raises(UserError, match="another run"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint=str(other)))


@pytest.mark.parametrize("name", ["run", "run/inside"])
def test_a_folder_that_is_a_file(config, tmp_path, name):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"), output_folder(replace(config, output_dir=str(tmp_path / name))):
        pass


@pytest.mark.parametrize("name", ["instance_data_dir", "class_data_dir"])
def test_a_folder_of_pictures_is_no_output_folder(config, tmp_path, name):
    given = replace(config, with_prior_preservation=True, class_data_dir=str(tmp_path / "class"))
    message = r"--output_dir .*: is the folder of (a subject's photos|class images)"
    given = replace(given, output_dir=f"{getattr(given, name)}/")
    with pytest.raises(UserError, match=message), output_folder(given):
        pass


def test_a_second_run_in_the_folder_is_refused(config, tmp_path):
    with held(tmp_path / "run", 60) as number:
        message = rf"another run is writing to it \(process {number} on .*\); wait for it, or choose another folder"
        with pytest.raises(UserError, match=message), output_folder(config):
            pass


def test_a_folder_that_cannot_be_written(config, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gsoft_diffusion.training.checkpoints.locked", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"), output_folder(config):
        pass


def test_settings_that_cannot_be_written(config):
    with pytest.raises(UserError, match=r"cannot write .*settings\.yaml: No such file or directory"):
        write_settings(config)


def test_one_too_many_that_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(checkpoint: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gsoft_diffusion.training.checkpoints._delete", refuse)
    with pytest.raises(
        UserError, match=r"cannot delete .*checkpoint-1, the oldest beyond --checkpoints_total_limit: Permission denied"
    ):
        save(tmp_path, 2, limit=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_the_folder_goes_again_if_nothing_was_written(config, tmp_path):
    config = replace(config, output_dir=str(tmp_path / "a" / "b"))
    with output_folder(config):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with output_folder(config):
        (tmp_path / "a" / "b" / "x").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x"]


def test_what_a_killed_run_left_unfinished_is_cleared_away_and_nothing_else(config, tmp_path):
    folder = tmp_path / "run"
    (folder / ".checkpoint-3.tmp").mkdir(parents=True)
    (folder / ".checkpoint-3.tmp" / STATE).touch()
    for name in (f".{ADAPTER}.12.tmp", f".{SETTINGS}.12.tmp", ".README.md.12.tmp", ".mine.tmp", "notes.tmp"):
        (folder / name).touch()
    with output_folder(config):
        pass
    assert {path.name for path in folder.iterdir()} == {".mine.tmp", "notes.tmp"}


def test_resume_where_there_is_nothing(config, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="checkpoint-7: is not"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint=str(tmp_path / "checkpoint-7")))


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(config, tmp_path):
    resumed, said = replace(config, resume_from_checkpoint="latest"), []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / PROGRESS).touch()
    with pytest.raises(UserError, match="no checkpoint in"):  # no settings: it is not known that this was a run
        checkpoint_to_resume(resumed)
    write_settings(config)
    assert checkpoint_to_resume(resumed, said.append) is None
    assert said == [
        f"note: the run in {tmp_path / 'run'} ended before its first checkpoint; it starts from the beginning"
    ]
    (tmp_path / "run" / ADAPTER).touch()
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint_to_resume(resumed)


def test_a_run_that_began_from_another_folders_checkpoint_does_not_start_at_zero(config, tmp_path):
    origin = save(tmp_path / "other", 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / PROGRESS).touch()
    write_settings(config, elsewhere=True)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="ended before its first checkpoint; delete the folder, or choose another"):
        checkpoint_to_resume(replace(config, resume_from_checkpoint=str(origin)))


def test_resume_finds_the_latest_or_the_named_one(config, tmp_path):
    for step in (9, 10):
        save(tmp_path / "run", step)
    assert checkpoint_to_resume(replace(config, resume_from_checkpoint="latest")) == tmp_path / "run" / "checkpoint-10"
    named = replace(config, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    with pytest.raises(UserError, match=r"would overwrite checkpoint-10; choose a new --output_dir"):
        checkpoint_to_resume(named)
    elsewhere = replace(named, output_dir=str(tmp_path / "elsewhere"))
    assert checkpoint_to_resume(elsewhere) == tmp_path / "run" / "checkpoint-9"
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")
    assert checkpoint_to_resume(named) == tmp_path / "run" / "checkpoint-9"


def test_changed_settings_are_named(config):
    said = []

    def check(before: TrainingConfig, **changes: object) -> None:
        now = replace(before, **changes)
        check_unchanged(now, Path("checkpoint-9"), before.to_dict(), now.to_dict(), said.append)

    config = replace(config, learning_rate=2e-5)
    check(config)
    check(config, max_train_steps=5000, validation_prompts=("x",))
    with pytest.raises(UserError, match=r"checkpoint-9: learning_rate is 0\.5 and was 2e-05; .*--accept_changes"):
        check(config, learning_rate=0.5)
    assert said == []
    check(config, learning_rate=0.5, accept_changes=True, resume_from_checkpoint="checkpoint-9")
    assert said == ["note: learning_rate is 0.5 and was 2e-05: accepted"]
    with pytest.raises(UserError, match="max_train_steps is 9 and was None"):
        check(replace(config, lr_scheduler="cosine"), max_train_steps=9)


def test_changed_circumstances_are_named(config):
    with pytest.raises(UserError, match=r"d\.png is new, b\.png is gone, number of processes is 2 and was 1"):
        check_unchanged(
            config,
            Path("checkpoint-9"),
            {"number of processes": 1, "a.png": "1", "b.png": "2"},
            {"number of processes": 2, "a.png": "1", "d.png": "2"},
        )


def test_settings_that_the_user_has_written_are_not_replaced(config):
    path = Path(config.output_dir or "") / SETTINGS
    path.parent.mkdir()
    path.write_text("class_word: dog  # mine\n")
    with pytest.raises(UserError, match=rf"--output_dir .*run: has a {SETTINGS} of your own, .*; move it, or choose"):
        checkpoint_to_resume(config)
