"""Flow matching: sampling of noise levels, noising, prediction types, loss and its weights. Pure functions.

Three clocks, float32 always: ``sigma`` in [0, 1] (1 = noise), ``timestep`` = 1000 * sigma, ``lumina_time`` = 1 - sigma
(1 = picture). All conversions between them are here. B batch, C latent channels, H W latent height and width.

    x = (1 - sigma) * latents + sigma * noise
    velocity = latents - noise            (what the model predicts at lumina_time)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from library.lumina.placement import copied_to
from library.lumina.settings import FlowSettings

NUM_TIMESTEPS = 1000
_MIN_SIGMA = 1e-4  # keeps sigma^-2 finite; below it the weight would exceed anything float32 sums hold


def lumina_time(sigma: Tensor) -> Tensor:
    """Returns the model's clock (1 = picture) for noise levels."""
    return 1.0 - sigma


def shift_sigma(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """Returns noise levels moved towards noise: shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(latent_height: int, latent_width: int) -> float:
    """Returns e^mu, with mu linear in the number of image tokens: 0.5 at 256 tokens, 1.15 at 4096 (Next-DiT, FLUX)."""
    num_tokens = (latent_height // 2) * (latent_width // 2)
    mu = 0.5 + (num_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return math.exp(mu)


def sample_sigma(
    settings: FlowSettings, uniform: Tensor, normal: Tensor, latent_height: int, latent_width: int
) -> Tensor:
    """Returns the noise levels to train at.

    Args:
        settings: the distribution and the range of timesteps, into which it is squeezed linearly.
        uniform: (B,) float32, drawn from U[0, 1).
        normal: (B,) float32, drawn from N(0, 1).
        latent_height: H.
        latent_width: W.

    Returns:
        sigma (B,) float32 in [0, 1].
    """
    mode = settings.timestep_sampling
    if mode == "uniform":
        sigma = uniform
    elif mode == "nextdit_shift":
        sigma = shift_sigma(uniform, resolution_shift(latent_height, latent_width))
    elif mode == "sigma":
        sigma = _sigma_of_density(settings, uniform, normal)
    else:
        sigma = torch.sigmoid(settings.sigmoid_scale * normal)
        if mode == "shift":
            sigma = shift_sigma(sigma, settings.discrete_flow_shift)
        elif mode == "flux_shift":
            sigma = shift_sigma(sigma, resolution_shift(latent_height, latent_width))
    low, high = settings.timestep_range
    return (low + (high - low) * sigma.float()) / NUM_TIMESTEPS


def _sigma_of_density(settings: FlowSettings, uniform: Tensor, normal: Tensor) -> Tensor:
    """Returns sigma by the densities of Stable Diffusion 3 (arXiv 2403.03206, 3.1), on 1000 shifted steps."""
    u = uniform
    if settings.weighting_scheme == "logit_normal":
        u = torch.sigmoid(settings.logit_mean + settings.logit_std * normal)
    elif settings.weighting_scheme == "mode":
        u = 1 - uniform - settings.mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    index = (u * NUM_TIMESTEPS).floor().clamp(0, NUM_TIMESTEPS - 1)
    return shift_sigma((NUM_TIMESTEPS - index) / NUM_TIMESTEPS, settings.discrete_flow_shift)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns x (B,C,H,W) float32, the latents at noise level ``sigma`` (B,)."""
    level = sigma.view(-1, 1, 1, 1)
    return (1 - level) * latents.float() + level * noise.float()


def perturbed_noise(noise: Tensor, extra: Tensor, strength: Tensor) -> Tensor:
    """Returns the noise of the model's input under input perturbation (arXiv 2301.11706).

    Args:
        noise: (B,C,H,W), the noise of the target.
        extra: (B,C,H,W), drawn from N(0, 1).
        strength: (B,), gamma of each sample.
    """
    return noise + strength.view(-1, 1, 1, 1) * extra


def loss_map(
    settings: FlowSettings, velocity: Tensor, latents: Tensor, noise: Tensor, noisy: Tensor, sigma: Tensor
) -> Tensor:
    """Returns the loss of every latent element, (B,C,H,W) float32, weighted as the settings say.

    Args:
        settings: prediction type, weighting scheme and loss type.
        velocity: the model's output.
        latents: the clean latents.
        noise: the noise in ``noisy``'s target (without input perturbation).
        noisy: x, what the model saw.
        sigma: (B,) noise levels.
    """
    prediction = prediction_of(settings, velocity, noisy, sigma)
    return loss_between(settings, prediction, target_of(settings, latents, noise), sigma)


def prediction_of(settings: FlowSettings, velocity: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """Returns what the settings compare with the target, (B,C,H,W) float32, from the model's output.

    ``raw`` compares velocities, ``additive`` too (it adds the noisy latents to both sides, which is the same
    difference), ``sigma_scaled`` compares the clean latents that follow from the velocity, x + sigma * velocity.
    """
    if settings.model_prediction_type == "sigma_scaled":
        return noisy + sigma.view(-1, 1, 1, 1) * velocity.float()
    return velocity.float()


def target_of(settings: FlowSettings, latents: Tensor, noise: Tensor) -> Tensor:
    """Returns what :func:`prediction_of` ought to be, (B,C,H,W) float32."""
    return latents.float() if settings.model_prediction_type == "sigma_scaled" else latents.float() - noise.float()


def loss_between(settings: FlowSettings, prediction: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """Returns the weighted loss of every latent element, (B,C,H,W) float32."""
    loss = _elementwise_loss(settings, prediction - target, sigma)
    if settings.model_prediction_type == "sigma_scaled":
        loss = loss * loss_weight(settings, sigma).view(-1, 1, 1, 1)
    return loss


def mean_of_samples(loss: Tensor, masks: Tensor | None = None, by_area: bool = False) -> Tensor:
    """Returns each sample's loss (B,) from its loss map (B,C,H,W).

    Args:
        loss: of every latent element.
        masks: (B,H,W) in [0, 1], factors on the map; None counts everything. The mean is over all elements, also those
            that are masked out, so a small mask gives a small loss.
        by_area: divide by the mask's mean, which makes it the mean over what the mask lets through; an empty mask
            gives 0.
    """
    if masks is None:
        return loss.mean(dim=(1, 2, 3))
    masks = copied_to(masks, loss.device).to(loss.dtype)
    means = (loss * masks.unsqueeze(1)).mean(dim=(1, 2, 3))
    if not by_area:
        return means
    area = masks.mean(dim=(1, 2))
    return means / torch.where(area > 0, area, 1)


def loss_weight(settings: FlowSettings, sigma: Tensor) -> Tensor:
    """Returns the weight (B,) that ``--weighting_scheme`` gives each noise level."""
    if settings.weighting_scheme == "sigma_sqrt":
        return sigma.clamp_min(_MIN_SIGMA) ** -2
    if settings.weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def _elementwise_loss(settings: FlowSettings, difference: Tensor, sigma: Tensor) -> Tensor:
    if settings.loss_type == "l2":
        return difference**2
    if settings.loss_type == "l1":
        return difference.abs()
    c = huber_threshold(settings, sigma).view(-1, 1, 1, 1)
    smooth = torch.sqrt(difference**2 + c**2) - c
    return 2 * c * smooth if settings.loss_type == "huber" else 2 * smooth


def huber_threshold(settings: FlowSettings, sigma: Tensor) -> Tensor:
    """Returns the pseudo-Huber threshold c (B,) of each noise level.

    constant: huber_c * scale. exponential: from scale at no noise to huber_c * scale at full noise, geometrically.
    snr: from 1 at no noise to huber_c, as (1 - huber_c) / (1 + noise / signal)^2 + huber_c; the ratio of noise to signal
    in flow matching is sigma / (1 - sigma), which makes that (1 - huber_c) * (1 - sigma)^2 + huber_c.
    """
    if settings.huber_schedule == "constant":
        return torch.full_like(sigma, settings.huber_c * settings.huber_scale)
    if settings.huber_schedule == "exponential":
        return torch.exp(math.log(settings.huber_c) * sigma) * settings.huber_scale
    return (1 - settings.huber_c) * (1 - sigma) ** 2 + settings.huber_c
