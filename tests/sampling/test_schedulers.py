from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
from conftest import PIXELS, write_base
from pretended import pretended_gpu
from tiny_families import WRITERS, write_flux, write_sdxl

from gsoft_diffusion.config import SamplerConfig
from gsoft_diffusion.config.defaults import GUIDANCE, MINIATURE_GUIDANCE
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.families import FAMILIES
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.models.noise import scheduler_class
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.sampling.schedulers import fits, fitting, make_scheduler, with_model_sampler

DOCUMENTED = " ".join((Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").split())
FEW_STEPS = SamplerConfig(num_inference_steps=4, guidance_scale=2.0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_scheduler_that_fits_draws_and_is_documented(family, tmp_path):
    model = load_model(str(WRITERS[family](tmp_path / "base")))
    kinds = fitting(model)
    assert type(model.scheduler) in kinds
    assert f" {', '.join(kind.__name__.removesuffix('Scheduler') for kind in kinds)}" in DOCUMENTED
    conditioning = model.encode_prompts(["a dog"])
    model.encode_prompts = lambda prompts: conditioning  # the same for all of them
    for kind in kinds:
        sampler = replace(FEW_STEPS, scheduler=kind.__name__)
        (sample,) = generate(model, [("a dog", 3)], sampler, resolution=PIXELS)
        assert np.asarray(sample.image).std() > 1, f"{kind.__name__} draws a blank"


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_sdxl, "EDMEulerScheduler"),  # diffusers counts it among those for any Stable Diffusion
        (write_sdxl, "DDIMInverseScheduler"),  # goes from a picture to noise
        (write_sdxl, "CogVideoXDDIMScheduler"),  # arrives, on a noise schedule of its own
        (write_sdxl, "RePaintScheduler"),  # wants a mask
        (write_flux, "DEISMultistepScheduler"),  # takes flows, and leaves noise
        (write_flux, "LTXEulerAncestralRFScheduler"),  # arrives, without the checkpoint's shift
        (write_flux, "HeliosScheduler"),
    ],
)
def test_those_that_do_not_fit(write, name, tmp_path):
    assert not fits(load_model(str(write(tmp_path / "base"))), scheduler_class(name))


@pytest.mark.parametrize(
    ("write", "name"), [(write_sdxl, "FlowMatchEulerDiscreteScheduler"), (write_flux, "DDIMScheduler")]
)
def test_one_that_does_not_fit_is_refused_with_those_that_do(write, name, tmp_path):
    model = load_model(str(write(tmp_path / "base")))
    own = type(model.scheduler).__name__
    with pytest.raises(UserError, match=f"--scheduler {name} does not fit .*base; these do: .*{own}, .*UniPCMultistep"):
        make_scheduler(model, replace(FEW_STEPS, scheduler=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "NoSuchScheduler"}, "no scheduler NoSuchScheduler"),
        ({"scheduler": "UNet2DConditionModel"}, "no scheduler UNet2DConditionModel"),
        ({"scheduler": "PNDMScheduler", "num_inference_steps": 2}, "PNDMScheduler with --num_inference_steps 2"),
        ({"num_inference_steps": 1001}, "--num_inference_steps: at most 1000"),
    ],
)
def test_samplers_that_cannot_work(base, changes, message):
    with pytest.raises(UserError, match=message):
        make_scheduler(load_model(str(base)), replace(FEW_STEPS, **changes))


def test_one_that_needs_another_package_says_which(monkeypatch):
    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", SimpleNamespace(_backends=["torch", "scipy"]), raising=False)
    with pytest.raises(UserError, match="LMSDiscreteScheduler needs torch and scipy"):
        scheduler_class("LMSDiscreteScheduler")


def test_latents_are_not_clipped(tmp_path):
    """Whatever the checkpoint's scheduler says, or leaves to the default of another."""
    model = load_model(str(write_sdxl(tmp_path / "base")))
    assert not hasattr(model.scheduler.config, "clip_sample")
    assert not make_scheduler(model, replace(FEW_STEPS, scheduler="DDIMScheduler")).config.clip_sample


def test_the_trial_is_quiet(base, caplog):
    with caplog.at_level("WARNING"):
        assert not fits(load_model(str(base)), diffusers.FlowMatchEulerDiscreteScheduler)
    assert not caplog.records


def test_what_the_model_decides_is_filled_in(base, monkeypatch):
    model = load_model(str(base))
    usual = with_model_sampler(model, SamplerConfig())
    assert (usual.scheduler, usual.guidance_scale) == (type(model.scheduler).__name__, MINIATURE_GUIDANCE)
    wanted = SamplerConfig(guidance_scale=7.0, scheduler="DPMSolverMultistepScheduler")
    assert with_model_sampler(model, wanted) == wanted
    monkeypatch.setattr(type(model), "resolution", 512)
    assert with_model_sampler(model, SamplerConfig()).guidance_scale == GUIDANCE


@pytest.mark.parametrize("write", [write_base, write_flux])
def test_drawing_on_a_gpu_waits_no_more_for_more_steps(write, tmp_path):
    with pretended_gpu() as gpu:
        model = load_model(str(write(tmp_path / "base")), device="cuda")
        counted = []
        for steps in (2, 5):
            gpu.reset()
            sampler = replace(FEW_STEPS, num_inference_steps=steps)
            (sample,) = generate(model, [("a dog", 3)], sampler, resolution=PIXELS)
            counted.append((gpu.waits.total(), gpu.kernels.total()))
    assert np.asarray(sample.image).std() > 1
    assert counted[0][0] == counted[1][0]
    assert counted[0][1] < counted[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_base, write_flux])
def test_the_same_schedulers_fit_on_a_gpu(write, tmp_path):
    """Whatever a scheduler raises means that it does not fit, so mixed devices would only make the list shorter."""
    base = str(write(tmp_path / "base"))
    expected = fitting(load_model(base))
    with pretended_gpu():
        assert fitting(load_model(base, device="cuda")) == expected
