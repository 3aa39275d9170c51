from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from gsoft_diffusion.models.flow_matching import FlowMatching
from gsoft_diffusion.models.noise import prediction_target


def test_timesteps_are_distributed_as_in_diffusers_training():
    """Logit-normal, looked up in the shifted timesteps: the same deciles as from diffusers' own draws."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    drawn = FlowMatching(scheduler).draw(torch.arange(1000))
    generator = torch.Generator().manual_seed(0)
    density = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.0, logit_std=1.0, generator=generator
    )
    expected = scheduler.timesteps[(density * 1000).long()]
    deciles = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(drawn.quantile(deciles), expected.quantile(deciles), rtol=0, atol=6)
    assert set(drawn.tolist()) <= set(scheduler.timesteps.tolist())


def test_noise_is_added_as_in_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    timesteps = scheduler.timesteps[[10, 700]]
    found = FlowMatching(scheduler).add_noise(latents, noise, timesteps)
    torch.testing.assert_close(found, scheduler.scale_noise(latents, timesteps, noise))


def test_the_target_is_the_velocity_along_the_way():
    """Going by it from any point for the rest of the way arrives at the picture."""
    flow = FlowMatching(FlowMatchEulerDiscreteScheduler(shift=3.0))
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    timesteps = flow.timesteps[[100, 900]]
    noisy = flow.add_noise(latents, noise, timesteps)
    velocity = prediction_target(flow, latents, noise, timesteps)
    torch.testing.assert_close(noisy - (timesteps / 1000)[:, None, None, None] * velocity, latents, atol=1e-5, rtol=0)
