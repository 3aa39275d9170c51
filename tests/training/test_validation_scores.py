"""Scores of validation pictures while a run is under way."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
from PIL import Image
from pretended import pretended_training

from gsoft_diffusion.config import Concept
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import latest_sheet
from gsoft_diffusion.sampling.pictures import read_facts
from gsoft_diffusion.scoring.judge import Judge, encoders_for
from gsoft_diffusion.training import validation as validation_module
from gsoft_diffusion.training import validation_scores as scores_module
from gsoft_diffusion.training.step import TrainingStep
from gsoft_diffusion.training.train import train
from gsoft_diffusion.training.validation_scores import StepScores, best_step, read_scores


@pytest.fixture
def scored(config):
    """Two prompts, drawn by the base model, after two steps and at the end."""
    prompts = ("a sks dog on the beach", "a sks dog in the snow")
    return replace(
        config, num_validation_images=1, validation_prompts=prompts, validation_steps=2, score_validation=True
    )


def test_every_picture_is_kept_with_its_facts_and_every_step_scored(scored):
    folder = train(scored).adapter.parent
    for step in (0, 2, 4):
        pictures = sorted((folder / "validation" / f"step-{step:06d}").glob("*.png"))
        facts = [read_facts(path) for path in pictures]
        assert [each["prompt"] for each in facts] == list(scored.validation_prompts)
        assert {each["model"] for each in facts} == {"adapter" if step else "base"}
        scores = read_scores(folder, step)
        assert scores is not None
        assert (scores.balance is None) == (step == 0)
        assert (folder / "validation" / f"step-{step:06d}.png").is_file()
    assert read_scores(folder, 3) is None
    assert latest_sheet(folder) == folder / "validation" / "step-000004.png"


def test_the_base_is_drawn_once_and_is_no_sheet_of_the_adapter(scored):
    folder = train(replace(scored, max_train_steps=2, checkpointing_steps=2, validation_steps=0)).adapter.parent
    base = folder / "validation" / "step-000000.png"
    before = base.stat().st_mtime_ns
    (folder / "validation" / "step-000002.png").unlink()
    assert latest_sheet(folder) is None
    train(replace(scored, max_train_steps=3, resume_from_checkpoint="latest"))
    assert base.stat().st_mtime_ns == before
    assert read_scores(folder, 3).balance is not None


def test_the_base_pictures_are_the_base_models(scored):
    """An adapter at its start changes nothing, so that they are what the base model draws without one."""
    from gsoft_diffusion.models.loading import load_model
    from gsoft_diffusion.sampling.generation import generate

    folder = train(scored).adapter.parent
    model = load_model(scored.pretrained_model_name_or_path)
    jobs = [(prompt, scored.seed) for prompt in scored.validation_prompts]
    drawn = [sample.image for sample in generate(model, jobs, scored.sampler)]
    kept = [Image.open(path) for path in sorted((folder / "validation" / "step-000000").glob("*.png"))]
    differences = [max(high for _, high in _differences(a, b)) for a, b in zip(drawn, kept, strict=True)]
    assert max(differences) <= 1


def _differences(a, b):
    from PIL import ImageChops

    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema()


def test_pictures_are_scored_on_the_cpu(scored, monkeypatch):
    """The encoders would take memory of the GPU that the run may need."""
    loaded = []
    monkeypatch.setattr(scores_module, "encoders_for", lambda *given: loaded.append(encoders_for(*given)) or loaded[-1])
    pretended_training(scored)
    assert {encoder.device.type for each in loaded for encoder in (each.clip, each.dino)} == {"cpu"}


def test_the_miniature_encoders_do_not_choose_a_large_models_best_step(scored, monkeypatch):
    monkeypatch.setattr(scores_module, "MINIATURE_BELOW", 16)  # the tiny base counts as a large one
    monkeypatch.setattr(scores_module, "encoders_for", lambda miniature: encoders_for(True))  # as without a network
    with pytest.raises(
        UserError, match=r'--keep best: the bundled miniature encoders cannot judge photos; pip install "'
    ):
        train(replace(scored, keep="best"))
    assert train(replace(scored, output_dir=f"{scored.output_dir}_last")).adapter.is_file()


def test_without_the_setting_there_are_sheets_only(scored):
    folder = train(replace(scored, score_validation=False)).adapter.parent
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["step-000002.png", "step-000004.png"]


def two_subjects(config, tmp_path):
    """A dog and a mug, of whose two photos one is the other, turned."""
    mugs = tmp_path / "mugs"
    mugs.mkdir()
    photo = Image.effect_noise((40, 40), 50)
    for number in range(2):
        photo.rotate(90 * number).save(mugs / f"{number}.png")
    concepts = (Concept(config.instance_data_dir, "dog", "sks"), Concept(str(mugs), "mug", "zwx"))
    return replace(config, instance_data_dir="", class_word=None, concepts_list=concepts, max_train_steps=2)


def test_each_of_several_subjects_is_scored_by_the_pictures_that_name_it(scored, tmp_path):
    prompts = ("a sks dog on the beach", "a zwx mug", "a sks dog beside a zwx mug")
    config = replace(two_subjects(scored, tmp_path), validation_prompts=prompts)
    place = train(config).adapter.parent / "validation" / "step-000002"
    values = json.loads((place / "scores.json").read_text())
    assert values["subjects"].keys() == {"a sks dog", "a zwx mug"}
    for name in ("dino", "clip_t", "balance"):
        assert values[name] == pytest.approx(sum(each[name] for each in values["subjects"].values()) / 2)
    pictures = [Image.open(path) for path in sorted(place.glob("*.png"))]
    judge = Judge(
        encoders_for(True), map(Image.open, sorted((tmp_path / "mugs").iterdir())), ["a mug", "a dog beside a mug"]
    )
    alone = judge(pictures[1:])
    assert values["subjects"]["a zwx mug"]["dino"] == pytest.approx(alone.dino, abs=1e-6)
    assert values["subjects"]["a zwx mug"]["clip_t"] == pytest.approx(alone.clip_t, abs=1e-6)


def test_a_subject_that_no_prompt_names_cannot_be_scored(scored, tmp_path):
    with pytest.raises(UserError, match="--score_validation: no validation prompt names a zwx mug, so that it cannot"):
        train(two_subjects(scored, tmp_path))


def test_the_base_is_drawn_again_for_other_prompts(scored):
    scored = replace(scored, max_train_steps=2, checkpointing_steps=2)
    folder = train(scored).adapter.parent
    other = replace(scored, validation_prompts=("a sks dog in space",), resume_from_checkpoint="latest")
    train(replace(other, max_train_steps=3))
    (picture,) = (folder / "validation" / "step-000000").glob("*.png")
    assert read_facts(picture)["prompt"] == "a sks dog in space"


def test_the_base_is_drawn_without_the_adapter_when_scores_are_asked_for_later(scored):
    whole = train(replace(scored, max_train_steps=2, output_dir=f"{scored.output_dir}-whole")).adapter.parent
    scored = replace(scored, max_train_steps=2, checkpointing_steps=2)
    folder = train(replace(scored, score_validation=False)).adapter.parent
    train(replace(scored, max_train_steps=3, resume_from_checkpoint="latest"))
    first, later = (sorted((each / "validation" / "step-000000").glob("*.png")) for each in (whole, folder))
    for one, other in zip(first, later, strict=True):
        assert max(high for _, high in _differences(Image.open(one), Image.open(other))) <= 1
    assert read_scores(folder, 3).balance is not None


def test_one_photo_cannot_be_scored_with(scored, photos):
    for path in sorted(photos.glob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match="--score_validation: needs at least two photos"):
        train(scored)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"dino": "x", "clip_t": 1}', "[" * 100_000])
def test_scores_that_cannot_be_read_are_none(tmp_path, content):
    place = tmp_path / "validation" / "step-000002"
    place.mkdir(parents=True)
    (place / "scores.json").write_text(content)
    assert read_scores(tmp_path, 2) is None


def test_the_best_step_is_the_earliest_of_the_best_balance():
    scores = [StepScores(step, 0, 0, balance) for step, balance in ((0, None), (1, 0.2), (2, 0.4), (3, 0.4))]
    assert best_step(scores) == 2
    assert best_step(scores[:1]) is None
    assert best_step([StepScores(1, 0, 0, 0.0)]) is None


def test_a_signal_asks_for_a_sheet_after_the_step(config, monkeypatch):
    update, draw, steps = TrainingStep.update, validation_module.Validation.draw_here, []

    def updated(step, *arguments):
        update(step, *arguments)
        if step.state.step == 1:  # the second
            os.kill(os.getpid(), signal.SIGUSR1)

    def drawn(validation, stop):
        steps.append(validation.state.step)
        return draw(validation, stop)

    monkeypatch.setattr(TrainingStep, "update", updated)
    monkeypatch.setattr(validation_module.Validation, "draw_here", drawn)
    before = signal.getsignal(signal.SIGUSR1)
    folder = train(replace(config, num_validation_images=1, validation_steps=0)).adapter.parent
    assert steps == [2, 4]
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_in_a_step_whose_sheet_is_due_asks_for_no_second_one(config, monkeypatch):
    update = TrainingStep.update

    def updated(step, *arguments):
        update(step, *arguments)
        if step.state.step == 1:  # the second
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(TrainingStep, "update", updated)
    folder = train(replace(config, num_validation_images=1, validation_steps=2)).adapter.parent
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["step-000002.png", "step-000004.png"]


def test_scores_say_what_they_were_made_with(scored):
    folder = train(scored).adapter.parent
    values = json.loads((folder / "validation" / "step-000004" / "scores.json").read_text())
    assert {"dino", "clip_t", "balance", "photos", "encoders"} <= values.keys()
    assert values["encoders"]["dino"]["miniature"]
