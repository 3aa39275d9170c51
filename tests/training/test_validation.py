"""Validation pictures."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsoft_diffusion.foundation.run_folder import scored_steps
from gsoft_diffusion.training import validation as validation_module
from gsoft_diffusion.training.train import train


@pytest.mark.parametrize(("at", "steps"), [(2, 2), (4, 4)])
def test_a_request_to_stop_does_not_wait_for_a_validation_sheet(config, monkeypatch, at, steps):
    """At step 2 the run stops there; at its end it is complete, card and all, without the last sheet."""
    original = validation_module.generate
    drawn = []

    def generate(*arguments, **options):
        for sample in original(*arguments, **options):
            drawn.append(sample)
            if len(drawn) == at:  # with two pictures a sheet: the last of the first, the last of the second
                os.kill(os.getpid(), signal.SIGTERM)
            yield sample

    monkeypatch.setattr(validation_module, "generate", generate)
    prompts = ("a dog", "a sks dog")
    changes = {"num_validation_images": 1, "validation_prompts": prompts, "validation_steps": 2, "sample_batch_size": 1}
    result = train(replace(config, **changes))
    folder = Path(config.output_dir or "")
    assert (result.steps, result.interrupted) == (steps, steps < 4)
    assert [path.name for path in (folder / "validation").glob("*")] == (["step-000002.png"] if at == 4 else [])
    assert (folder / "README.md").exists()


def test_validation_writes_a_sheet_every_so_many_steps_and_at_the_end(config):
    config = replace(config, num_validation_images=2, validation_steps=2, max_train_steps=5)
    folder = train(config).adapter.parent / "validation"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:06d}.png" for step in (2, 4, 5)]
    first, last = (np.asarray(Image.open(folder / f"step-{step:06d}.png"), dtype=int) for step in (2, 5))
    assert first.shape == last.shape
    assert np.abs(first[40:] - last[40:]).max() > 10  # below the title


def test_validation_shows_what_inference_draws(config):
    from gsoft_diffusion.config import GenerationConfig
    from gsoft_diffusion.sampling.drawing import draw

    config = replace(config, num_validation_images=2, validation_prompts=("a sks dog on the beach",))
    adapter = train(config).adapter
    (sheet,) = draw(GenerationConfig((str(adapter),), prompts=config.validation_prompts or (), num_images=2))
    drawn = np.asarray(Image.open(sheet).convert("RGB"), dtype=int)
    validated = np.asarray(Image.open(adapter.parent / "validation" / "step-000004.png").convert("RGB"), dtype=int)
    assert drawn.shape == validated.shape
    assert np.abs(drawn[40:] - validated[40:]).max() <= 2  # below the titles; enlarging may double a difference of 1


@pytest.mark.parametrize("score_validation", [False, True])
def test_a_validation_that_was_cut_short_is_drawn_when_the_run_goes_on(config, monkeypatch, score_validation):
    changes = {"num_validation_images": 1, "validation_steps": 2, "checkpointing_steps": 2}
    config = replace(config, score_validation=score_validation, **changes)
    original = validation_module.generate

    def generate(*arguments, **options):
        if len(list(Path(config.output_dir or "").glob("checkpoint-*"))) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation_module, "generate", generate)
        assert train(config).steps == 2
    folder = train(replace(config, resume_from_checkpoint="latest")).adapter.parent
    steps = [0, 2, 4] if score_validation else [2, 4]
    assert sorted(path.name for path in folder.glob("validation/*.png") if path.name != "curve.png") == [
        f"step-{step:06d}.png" for step in steps
    ]
    assert scored_steps(folder) == (steps if score_validation else [])
