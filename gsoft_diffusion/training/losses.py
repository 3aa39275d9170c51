"""The model's targets and its loss: pure functions, all per sample except the last."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def signal_to_noise(scheduler: Any, timesteps: Tensor) -> Tensor:
    """`SNR_t = α_t² / σ_t²` of each sample, (B,), float32.

    scheduler: diffusers' noise scheduler, with `alphas_cumprod`. timesteps: (B,), whole numbers.
    """
    alpha_squared = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_squared / (1 - alpha_squared)


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weight of each sample, (B,): `min(SNR, γ)` on the error in `x`, in terms of what is predicted.

    snr: (B,), as `signal_to_noise` gives it.
    gamma: γ, the largest weight of an error in `x`.
    prediction_type: what the model predicts: `epsilon`, `v_prediction`, or else `x`.

    An error in `ε` is one in `x` times SNR, an error in `v` times SNR + 1, hence the divisions. Finite at SNR = 0.
    Source: Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, §3.4.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(SNR, γ) / SNR
    clamped = snr.clamp(max=gamma)
    return clamped / (snr + 1) if prediction_type == "v_prediction" else clamped


def add_offset(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """`noise` (B, C, H, W) plus `strength` times normal numbers `offset` (B, C, 1, 1) that are the same everywhere."""
    return noise + strength * offset


def denoising_loss(model_pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, (B,), in float32.

    model_pred, target: (B, C, H, W), of any floating-point dtype.
    weights: (B, 1, H, W), for each place of the picture; the mean is over all places, those that weigh 0 included, so
    that a subject that is half as large counts half as much, as it does without weights.
    """
    errors = (model_pred.float() - target.float()).square()
    if weights is not None:
        errors = weights * errors
    return errors.flatten(1).mean(dim=1)


def dreambooth_loss(losses: Tensor, is_prior: Tensor, prior_loss_weight: float) -> Tensor:
    """`mean over the subject's samples + prior_loss_weight · mean over the class's samples`, a scalar.

    A batch without class samples has the first term alone.

    losses: (B,), already weighted sample by sample, so each half has been weighted by its own timesteps.
    is_prior: (B,), bool: whether a sample is of the class.
    prior_loss_weight: of the class's half.

    Source: Ruiz et al., *DreamBooth*, §3.3.
    """
    # No tensor's shape depends on the values of `is_prior`, for which a GPU would have to be waited for.
    instance = losses.where(~is_prior, 0).sum() / (~is_prior).sum()
    prior = losses.where(is_prior, 0).sum() / is_prior.sum().clamp(min=1)
    return instance + prior_loss_weight * prior


def training_loss(
    model_pred: Tensor,
    target: Tensor,
    timesteps: Tensor,
    is_prior: Tensor,
    scheduler: Any,
    *,
    snr_gamma: float | None,
    prior_loss_weight: float,
    weights: Tensor | None = None,
) -> Tensor:
    """The whole loss of a batch, a scalar: squared errors, min-SNR weights by each sample's own timestep, the two
    halves.

    model_pred, target: (B, C, H, W): the prediction, and what it should have been.
    timesteps: (B,), for which the predictions were made.
    is_prior, prior_loss_weight: as in `dreambooth_loss`.
    scheduler: diffusers' noise scheduler; its configuration says what is predicted.
    snr_gamma: as `gamma` in `min_snr_weights`; None for no such weights.
    weights: of the places of each picture, as in `denoising_loss`.
    """
    losses = denoising_loss(model_pred, target, weights)
    if snr_gamma is not None:
        snr = signal_to_noise(scheduler, timesteps)
        losses = losses * min_snr_weights(snr, snr_gamma, scheduler.config.prediction_type)
    return dreambooth_loss(losses, is_prior, prior_loss_weight)
