"""From prompts and seeds to pictures."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretended import pretended_gpu
from transformers import CLIPTextModel

from gsoft_diffusion.config import SamplerConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.sampling import schedulers
from gsoft_diffusion.sampling.generation import generate

FEW_STEPS = SamplerConfig(num_inference_steps=3, guidance_scale=3.0)
JOBS = [("a dog", 7), ("a cat", 7), ("a dog", 8), ("", 0), ("a dog", 7)]


def arrays(samples) -> list[np.ndarray]:
    return [np.asarray(sample.image, dtype=int) for sample in samples]


def test_one_picture_for_each_job_in_order(base):
    model = load_model(str(base))
    samples = list(generate(model, JOBS, FEW_STEPS, batch_size=2))
    assert [(sample.prompt, sample.seed) for sample in samples] == JOBS
    assert {sample.image.size for sample in samples} == {(32, 32)}
    pictures = arrays(samples)
    assert np.abs(pictures[0] - pictures[4]).max() <= 1
    assert np.abs(pictures[0] - pictures[1]).max() > 1
    assert np.abs(pictures[0] - pictures[2]).max() > 1


@pytest.mark.parametrize("scheduler", [None, "PNDMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_pictures_do_not_depend_on_the_batch_size(base, scheduler, batch_size):
    model = load_model(str(base))
    sampler = replace(FEW_STEPS, scheduler=scheduler, num_inference_steps=5)
    alone = arrays(generate(model, JOBS, sampler, batch_size=1))
    together = arrays(generate(model, JOBS, sampler, batch_size=batch_size))
    assert max(np.abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 1


def test_embeddings_of_many_prompts_do_not_stay_on_the_gpu(base, monkeypatch):
    on_the_gpu = []
    with pretended_gpu():
        model = load_model(str(base), device=torch.device("cuda"))
        encode = type(model).encode_prompts

        def spy(self, prompts):
            found = encode(self, prompts)
            on_the_gpu.extend(weakref.ref(tensor) for tensor in found.values() if tensor.device.type == "cuda")
            return found

        monkeypatch.setattr(type(model), "encode_prompts", spy)
        jobs = [(f"a dog {number}", 0) for number in range(6)]
        pictures = generate(model, jobs, replace(FEW_STEPS, guidance_scale=1.0), batch_size=2)
        next(pictures)
        assert len(on_the_gpu) >= 6
        assert sum(tensor() is not None for tensor in on_the_gpu) <= 1


class Oracle(torch.nn.Module):
    """A UNet that knows the clean latents and predicts them perfectly, in the way the scheduler's config asks for."""

    def __init__(self, latents, scheduler):
        super().__init__()
        self.latents, self.alphas, self.kind = latents, scheduler.alphas_cumprod, scheduler.config.prediction_type

    def forward(self, noisy, timestep, encoder_hidden_states):
        alpha_squared = self.alphas[int(timestep.round())]
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        noise = (noisy - alpha * self.latents) / sigma
        sample = noise if self.kind == "epsilon" else alpha * noise - sigma * self.latents
        return SimpleNamespace(sample=sample)


@pytest.mark.parametrize("scheduler", [None, "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_perfect_model_draws_its_picture(any_base, scheduler):
    """Whatever the scheduler and the way of predicting, the sampler arrives where a perfect model points."""
    model = load_model(str(any_base))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    oracle = Oracle(latents, model.scheduler)
    oracle.config, oracle.dtype, oracle.device = model.unet.config, torch.float32, torch.device("cpu")
    model.unet = oracle
    sampler = SamplerConfig(num_inference_steps=20, guidance_scale=2.0, scheduler=scheduler)
    (picture,) = arrays(generate(model, [("a dog", 0)], sampler))
    wanted = ((model.decode(latents)[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    difference = np.abs(picture - wanted)
    assert difference.mean() < 2.5  # the last step leaves a little noise, by the schedule
    noise = ((model.decode(torch.randn(latents.shape))[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(noise - wanted).mean() > 5 * difference.mean()


@pytest.mark.slow
def test_same_pictures_as_diffusers_pipeline(any_base):
    from diffusers import StableDiffusionPipeline

    model = load_model(str(any_base))
    model.scheduler.register_to_config(steps_offset=1)  # the pipeline insists on it
    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a dog",
        negative_prompt="a cat",
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    sampler = SamplerConfig(num_inference_steps=5, guidance_scale=3.0, negative_prompt="a cat")
    (picture,) = arrays(generate(model, [("a dog", 3)], sampler))
    assert np.abs(picture - np.asarray(expected, dtype=int)).max() <= 1


def test_guidance_and_negative_prompt_matter(base):
    model = load_model(str(base))

    def picture(**changes) -> np.ndarray:
        return arrays(generate(model, [("a dog", 0)], replace(FEW_STEPS, **changes)))[0]

    assert np.abs(picture() - picture(guidance_scale=9.0)).max() > 1
    assert np.abs(picture() - picture(negative_prompt="a cat")).max() > 1
    unguided = picture(guidance_scale=1.0)
    for off in (0.0, 0.5):  # as in diffusers: the prompt counts, and nothing leads away from anything
        assert np.abs(unguided - picture(guidance_scale=off)).max() == 0
    assert np.abs(unguided - picture(guidance_scale=1.00001)).max() <= 1


def test_text_encoders_are_fetched_once_for_all_prompts(base, monkeypatch):
    moves = []
    to = CLIPTextModel.to

    def watched(network: CLIPTextModel, device: torch.device) -> CLIPTextModel:
        if next(network.parameters()).device != device:
            moves.append(device.type)
        return to(network, device)

    with pretended_gpu():
        model = load_model(str(base), device="cuda", cpu_offload=True)
        monkeypatch.setattr(CLIPTextModel, "to", watched)
        list(generate(model, JOBS[:3], FEW_STEPS, batch_size=1))
    assert moves == ["cuda"]  # back again nothing is copied


def test_without_guidance_no_negative_prompt_is_encoded(base, monkeypatch):
    model = load_model(str(base))
    monkeypatch.setattr(type(model), "encode_negative", lambda *_: pytest.fail("it has no effect"))
    assert list(generate(model, JOBS[:1], replace(FEW_STEPS, guidance_scale=1.0)))


def test_whether_a_scheduler_fits_is_tried_as_often_for_many_batches_as_for_one(base, monkeypatch):
    tried = []
    monkeypatch.setattr(schedulers, "fits", lambda model, kind: tried.append(kind) or True)
    model, sampler = load_model(str(base)), replace(FEW_STEPS, scheduler="EulerDiscreteScheduler")
    list(generate(model, JOBS[:1], sampler, batch_size=1))
    once = len(tried)
    list(generate(model, JOBS, sampler, batch_size=1))
    assert len(tried) == 2 * once > 0


def test_other_resolutions(base):
    (sample,) = generate(load_model(str(base)), [("a dog", 0)], FEW_STEPS, resolution=48)
    assert sample.image.size == (48, 48)
    with pytest.raises(UserError, match="--resolution 50"):
        next(generate(load_model(str(base)), [("a dog", 0)], FEW_STEPS, resolution=50))


def test_half_precision(base):
    model = load_model(str(base), dtype=torch.bfloat16)
    half = arrays(generate(model, JOBS[:1], FEW_STEPS))[0]
    full = arrays(generate(load_model(str(base)), JOBS[:1], FEW_STEPS))[0]
    assert np.abs(half - full).mean() < 8


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float32, ""), (torch.bfloat16, "; try --mixed_precision no")])
def test_pictures_that_are_not_finite_are_black_and_the_first_is_told_of(base, caplog, dtype, advice):
    model = load_model(str(base), dtype=dtype)
    decode = model.vae.decode

    def broken(latents):
        decoded = decode(latents)
        decoded.sample[0, 0, 0, 0] = float("nan")
        return decoded

    model.vae.decode = broken
    pictures = arrays(generate(model, JOBS, FEW_STEPS, batch_size=2))
    assert [picture.max() > 0 for picture in pictures] == [False, True, False, True, False]
    assert caplog.messages == [f"pixels are not finite: such pictures come out black{advice}"]
