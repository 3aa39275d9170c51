"""The best step of a run: which is kept, when a run ends for it, and that resuming changes neither."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import assert_same, weights

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.config.command_line import parse
from gsoft_diffusion.config.training import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.training import validation as validation_module
from gsoft_diffusion.training.best import Best, failed_validations, no_longer_improves
from gsoft_diffusion.training.checkpoints import read_state
from gsoft_diffusion.training.run import Run
from gsoft_diffusion.training.step import TrainingStep
from gsoft_diffusion.training.train import train
from gsoft_diffusion.training.validation_scores import ValidationScores


@pytest.fixture
def keeping(config):
    """Eight steps, scored after every second one."""
    changes = {"num_validation_images": 1, "validation_steps": 2, "max_train_steps": 8, "checkpointing_steps": 0}
    return replace(config, keep="best", **changes)


@pytest.fixture
def balances(monkeypatch):
    """A function by which the pictures of each step get the balance that is given for it."""
    write = ValidationScores.write

    def give(of_step):
        def written(self, samples, step):
            scores = write(self, samples, step)
            return scores | ({"balance": of_step[step]} if step else {})

        monkeypatch.setattr(ValidationScores, "write", written)

    return give


def stop_at(monkeypatch, step):
    """Have a signal ask the next run to stop while it takes this step."""
    loss = TrainingStep.loss

    def stopping(self, batch):
        if self.state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch)

    monkeypatch.setattr(TrainingStep, "loss", stopping)


def test_the_result_is_the_best_step_and_says_so(keeping, balances, capfd):
    balances({2: 0.2, 4: 0.6, 6: 0.6, 8: 0.3})
    result = train(keeping)
    assert (result.steps, result.interrupted) == (8, False)
    file = read_adapter(result.adapter)
    assert (file.step, file.last_step, file.training["balance"]) == (4, 8, 0.6)
    assert_same(file.tensors, weights(replace(keeping, keep="last", max_train_steps=4), "four"))
    assert "kept: step 4, by its balance of likeness and prompt, 0.600\n" in capfd.readouterr().out
    card = (result.adapter.parent / "README.md").read_text()
    for row in ("steps | 4", "steps of the run, of which the best was kept | 8"):
        assert f"| {row} |\n" in card
    assert "| balance of likeness and prompt, from 0 to 1 | 0.600 |" in card
    assert "validation/step-000004.png" in card


def test_the_last_step_may_be_the_best(keeping, balances):
    balances({2: 0.2, 4: 0.1, 6: 0.1, 8: 0.3})
    file = read_adapter(train(keeping).adapter)
    assert (file.step, file.last_step) == (8, 8)
    assert_same(file.tensors, weights(replace(keeping, keep="last"), "last"))


def test_without_a_balance_the_last_step_is_kept(keeping, balances, capfd):
    balances(dict.fromkeys((2, 4, 6, 8), 0.0))
    assert read_adapter(train(replace(keeping, patience=1)).adapter).step == 8
    assert (
        "note: no step had a balance of likeness and prompt above 0, so the last one is kept" in capfd.readouterr().out
    )


def test_a_run_ends_when_the_subject_improves_no_longer(keeping, balances, capfd):
    balances({2: 0.6, 4: 0.2, 6: 0.5, 8: 0.9})
    result = train(replace(keeping, patience=2))
    assert (result.steps, result.interrupted) == (6, False)
    file = read_adapter(result.adapter)
    assert (file.step, file.last_step) == (2, 6)
    assert "kept: step 2, by its balance of likeness and prompt, 0.600; no step up to 6 was better" in (
        capfd.readouterr().out
    )
    again = replace(keeping, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match=r"--patience 2: the run ended at step 6, .*nothing is left to train; .* or 0"):
        train(replace(again, patience=2))
    result.adapter.unlink()  # as if it had been killed before it was written
    written = read_adapter(train(replace(again, patience=2)).adapter)
    assert written.training == file.training
    assert_same(written.tensors, file.tensors)
    longer = train(replace(again, patience=0))
    assert (longer.steps, read_adapter(longer.adapter).step) == (8, 8)


@pytest.mark.parametrize(("patience", "changes"), [(0, {}), (2, {"optimizer": "schedulefree"})], ids=str)
def test_resuming_is_exact(keeping, balances, monkeypatch, patience, changes):
    """Stopped after the best step: the checkpoint holds it, though no other of that step is left."""
    if changes:
        pytest.importorskip("schedulefree")
    keeping = replace(keeping, patience=patience, checkpointing_steps=2, checkpoints_total_limit=1, **changes)
    balances({2: 0.6, 4: 0.2, 6: 0.5, 8: 0.4})
    whole = train(replace(keeping, output_dir=f"{keeping.output_dir}-whole"))
    assert whole.steps == (6 if patience else 8)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        stopped = train(keeping)
    assert (stopped.steps, stopped.interrupted) == (5, True)
    assert read_adapter(stopped.adapter).step == 2
    assert [path.name for path in stopped.adapter.parent.glob("checkpoint-*")] == ["checkpoint-5"]
    resumed = train(replace(keeping, resume_from_checkpoint="latest"))
    assert resumed.steps == whole.steps
    first, second = map(read_adapter, (whole.adapter, resumed.adapter))
    assert (second.step, second.last_step) == (first.step, first.last_step) == (2, whole.steps)
    assert_same(first.tensors, second.tensors)


@pytest.mark.parametrize("when", ["in the step", "while it draws"])
def test_a_run_that_was_stopped_before_its_pictures_were_judged_draws_them_when_it_goes_on(
    keeping, balances, monkeypatch, when
):
    balances({2: 0.2, 4: 0.6, 6: 0.5, 8: 0.4})
    with monkeypatch.context() as patch:
        if when == "in the step":
            stop_at(patch, 4)
        else:
            generate = validation_module.generate

            def stopping(*arguments, **options):
                if len(list(Path(keeping.output_dir, "validation").glob("step-*.png"))) == 2:  # the base's and one more
                    os.kill(os.getpid(), signal.SIGTERM)
                return generate(*arguments, **options)

            patch.setattr(validation_module, "generate", stopping)
        stopped = train(keeping)
    assert (stopped.steps, read_adapter(stopped.adapter).step) == (4, 2)
    assert read_adapter(train(replace(keeping, resume_from_checkpoint="latest")).adapter).step == 4


def test_the_best_goes_along_into_another_folder(keeping, balances, monkeypatch):
    balances({2: 0.6, 4: 0.2, 6: 0.5, 8: 0.4})
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        folder = train(keeping).adapter.parent
    other = replace(keeping, output_dir=f"{folder}-other", resume_from_checkpoint=str(folder))
    file = read_adapter(train(other).adapter)
    assert (file.step, file.last_step) == (2, 8)


def test_pictures_of_other_prompts_are_not_compared(keeping, balances, monkeypatch):
    balances({2: 0.6, 4: 0.2, 6: 0.5, 8: 0.4})
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        train(keeping)
    again = replace(keeping, resume_from_checkpoint="latest", validation_prompts=("a sks dog in space",))
    with pytest.raises(UserError, match=r"its best step, 2, was judged by other pictures or encoders .*accept_changes"):
        train(again)
    assert read_adapter(train(replace(again, accept_changes=True)).adapter).step == 6


def test_a_run_that_kept_the_last_goes_on_to_keep_the_best(keeping, balances, monkeypatch):
    balances({2: 0.9, 4: 0.2, 6: 0.5, 8: 0.4})
    last = replace(keeping, keep="last", max_train_steps=4, checkpointing_steps=4)
    folder = train(last).adapter.parent
    assert read_state(folder / "checkpoint-4")["best"] is None
    result = train(replace(keeping, resume_from_checkpoint="latest"))
    assert read_adapter(result.adapter).step == 6
    assert (folder / "validation" / "step-000000" / "scores.json").is_file()  # without it there is no balance


def test_a_result_is_not_replaced_by_one_of_a_shorter_run(keeping, balances):
    balances({2: 0.6, 4: 0.2, 6: 0.5, 8: 0.4})
    keeping = replace(keeping, checkpointing_steps=4)
    folder = train(replace(keeping, patience=0)).adapter.parent
    shutil.rmtree(folder / "checkpoint-8")
    with pytest.raises(UserError, match=r"--max_train_steps 6: .* was trained 8 steps and would be replaced by less"):
        train(replace(keeping, resume_from_checkpoint="latest", max_train_steps=6))


@pytest.mark.parametrize(("patience", "end", "best"), [(4, 8, 7), (3, 6, 1)])
def test_a_sheet_that_is_asked_for_may_be_the_best_but_patience_counts_validations(
    keeping, balances, monkeypatch, patience, end, best
):
    balances({1: 0.7, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.2, 6: 0.4, 7: 0.8, 8: 0.4})
    train_loop = Run.batches

    def asking(self):
        for batch in train_loop(self):
            os.kill(os.getpid(), signal.SIGUSR1)
            yield batch

    monkeypatch.setattr(Run, "batches", asking)
    result = train(replace(keeping, patience=patience))
    assert (result.steps, read_adapter(result.adapter).step) == (end, best)


def test_patience_counts_validations_whatever_their_distance(keeping, balances, monkeypatch):
    """The run goes on with twice as many of them."""
    balances({2: 0.1, 4: 0.6, 5: 0.2, 6: 0.2, 7: 0.2, 8: 0.9})
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        train(keeping)
    again = replace(keeping, validation_steps=1, patience=2, resume_from_checkpoint="latest")
    assert train(again).steps == 7


@pytest.mark.parametrize(
    ("patience", "failed", "over"), [(2, 1, False), (2, 2, True), (2, 3, True), (0, 7, False), (1, 1, True)]
)
def test_patience_counts_validations(patience, failed, over):
    config = TrainingConfig("photos", class_word="dog", keep="best", patience=patience, validation_steps=100)
    best = Best(200, 0.5, {}, {})
    assert no_longer_improves(config, best, failed) == over
    assert not no_longer_improves(config, None, failed)
    assert not no_longer_improves(replace(config, keep="last", patience=3), best, failed)


def test_a_checkpoint_of_an_earlier_version_has_no_count_of_validations():
    config = TrainingConfig("photos", class_word="dog", keep="best", validation_steps=100)
    state = {"best": Best(200, 0.5, {}, {}).to_dict(), "judged": 450}
    assert failed_validations(state, config) == 2
    assert failed_validations(state | {"failed": 3}, config) == 3
    assert failed_validations({"best": None}, config) == 0


def test_help_explains_it(capsys):
    with pytest.raises(SystemExit):
        parse(TrainingConfig, "a training", ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--keep {last,best}" in said
    assert "end the run when so many validations in a row bring nothing better" in said
