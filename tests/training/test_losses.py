from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from benchmarks.pretended_gpu import PretendedGPU
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.noise import prediction_target
from gsoft_diffusion.training.losses import (
    add_offset,
    denoising_loss,
    dreambooth_loss,
    min_snr_weights,
    signal_to_noise,
    training_loss,
)

TYPES = ["epsilon", "v_prediction", "sample"]
TIMESTEPS = torch.tensor([0, 10, 200, 500, 999])


def scheduler(prediction_type: str = "epsilon", zero_snr: bool = False) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
    )


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recovered_latents(prediction_type: str, noisy, prediction, alpha, sigma):
    """The clean latents that a prediction stands for, by inverting x_t = α·x + σ·ε."""
    return {
        "epsilon": lambda: (noisy - sigma * prediction) / alpha,
        "v_prediction": lambda: alpha * noisy - sigma * prediction,
        "sample": lambda: prediction,
    }[prediction_type]()


def alpha_sigma(noise_scheduler: DDPMScheduler):
    alpha = noise_scheduler.alphas_cumprod[TIMESTEPS].double().sqrt()[:, None, None, None]
    return alpha, (1 - alpha**2).sqrt()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_recovers_the_latents(prediction_type):
    noise_scheduler = scheduler(prediction_type)
    latents, noise = some(5, 4, 3, 3), some(5, 4, 3, 3, seed=1)
    noisy = noise_scheduler.add_noise(latents, noise, TIMESTEPS)
    target = prediction_target(noise_scheduler, latents, noise, TIMESTEPS)
    recovered = recovered_latents(prediction_type, noisy, target, *alpha_sigma(noise_scheduler))
    torch.testing.assert_close(recovered, latents, atol=1e-5, rtol=1e-5)  # alphas are float32


def test_unknown_prediction_type_is_refused():
    noise_scheduler = scheduler()
    noise_scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(UserError, match="flow"):
        prediction_target(noise_scheduler, some(1), some(1), TIMESTEPS[:1])


def test_signal_to_noise():
    alpha, sigma = alpha_sigma(scheduler())
    expected = ((alpha / sigma) ** 2).flatten().float()
    torch.testing.assert_close(signal_to_noise(scheduler(), TIMESTEPS), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_min_snr_weighs_the_error_in_the_latents_by_clamped_snr(prediction_type):
    """The definition: whatever is predicted, the loss is min(SNR, γ) times the squared error in x."""
    noise_scheduler, gamma = scheduler(prediction_type), 5.0
    alpha, sigma = alpha_sigma(noise_scheduler)
    latents, noise = some(5, 4, 3, 3), some(5, 4, 3, 3, seed=1)
    noisy = alpha * latents + sigma * noise
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}[prediction_type]
    prediction = target + some(5, 4, 3, 3, seed=2)
    recovered = recovered_latents(prediction_type, noisy, prediction, alpha, sigma)
    snr = ((alpha / sigma) ** 2).flatten()
    expected = snr.clamp(max=gamma) * (recovered - latents).square().flatten(1).mean(dim=1)
    weights = min_snr_weights(snr, gamma, prediction_type)
    torch.testing.assert_close(weights * (prediction - target).square().flatten(1).mean(dim=1), expected)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_min_snr_is_finite_where_nothing_is_left_of_the_signal(prediction_type):
    noise_scheduler = scheduler(prediction_type, zero_snr=True)
    snr = signal_to_noise(noise_scheduler, TIMESTEPS)
    assert snr[-1] < 1e-6
    weights = min_snr_weights(snr, 5.0, prediction_type)
    assert weights.isfinite().all()
    assert weights.min() >= 0


def test_offset_is_the_same_over_each_channel():
    noise, offset = some(2, 4, 3, 3), some(2, 4, 1, 1, seed=1)
    difference = add_offset(noise, offset, 0.1) - noise
    torch.testing.assert_close(difference, (0.1 * offset).expand(2, 4, 3, 3))
    assert torch.equal(add_offset(noise, offset, 0.0), noise)


def test_loss_is_per_sample_and_in_float32():
    prediction, target = some(3, 4, 2, 2).bfloat16(), some(3, 4, 2, 2, seed=1).bfloat16()
    losses = denoising_loss(prediction, target)
    assert losses.dtype == torch.float32
    for index in range(3):
        expected = torch.nn.functional.mse_loss(prediction[index].float(), target[index].float())
        torch.testing.assert_close(losses[index], expected)


def test_weights_of_places():
    prediction, target = some(2, 4, 3, 3), some(2, 4, 3, 3, seed=1)
    weights = torch.zeros(2, 1, 3, 3)
    weights[0, :, :, 0], weights[1] = 0.5, 1
    errors = (prediction - target).square()
    losses = denoising_loss(prediction, target, weights)
    torch.testing.assert_close(losses[0], 0.5 * errors[0, :, :, 0].float().sum() / errors[0].numel())
    assert torch.equal(losses[1], denoising_loss(prediction, target)[1])


def test_dreambooth_loss_is_the_sum_of_two_means():
    losses = torch.tensor([1.0, 10.0, 3.0, 20.0, 30.0])
    is_prior = torch.tensor([False, True, False, True, True])
    assert dreambooth_loss(losses, is_prior, 0.5).item() == 2.0 + 0.5 * 20.0
    assert dreambooth_loss(losses, torch.zeros(5, dtype=torch.bool), 0.5).item() == losses.mean().item()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_no_part_of_the_loss_waits_for_a_gpu(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    with PretendedGPU() as gpu:
        latents, noise = torch.randn(2, 4, 2, 8, 8, device="cuda")
        timesteps, is_prior = torch.tensor([3, 5, 7, 9], device="cuda"), torch.tensor([True, False] * 2, device="cuda")
        for _ in range(2):  # the first time, tables go to the GPU
            gpu.reset()
            target = prediction_target(scheduler, latents, noise, timesteps)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            options = {"snr_gamma": 5.0, "prior_loss_weight": 0.5, "weights": torch.ones(4, 1, 8, 8, device="cuda")}
            training_loss(noisy, target, timesteps, is_prior, scheduler, **options)
        assert gpu.kernels
        assert not gpu.waits


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_each_half_is_weighted_by_its_own_timesteps(prediction_type, snr_gamma):
    """The loss of the whole batch equals that of its halves computed apart."""
    noise_scheduler = scheduler(prediction_type)
    prediction, target = some(4, 4, 2, 2), some(4, 4, 2, 2, seed=1)
    timesteps = torch.tensor([5, 900, 40, 990])
    is_prior = torch.tensor([False, True, False, True])
    whole = training_loss(
        prediction, target, timesteps, is_prior, noise_scheduler, snr_gamma=snr_gamma, prior_loss_weight=0.7
    )
    halves = [
        training_loss(
            prediction[half],
            target[half],
            timesteps[half],
            torch.zeros(2, dtype=torch.bool),
            noise_scheduler,
            snr_gamma=snr_gamma,
            prior_loss_weight=0.0,
        )
        for half in (~is_prior, is_prior)
    ]
    torch.testing.assert_close(whole, halves[0] + 0.7 * halves[1])
