"""What chance decides for each sample of a batch: its noise and its noise level.

Both are functions of the sample's key. They are drawn on the CPU, so that every device and every number of processes draws
the same, and brought to where the latents are without waiting for that device.

Shapes: B samples, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from library import keyed_random
from library.lumina import flow
from library.lumina.placement import copied_to
from library.lumina.settings import FlowSettings


def noise_of(purpose: str, keys: Sequence[int], latents: Tensor) -> Tensor:
    """Returns noise (B,C,H,W) float32 for latents of that shape; another purpose gives other noise."""
    return copied_to(keyed_random.normal(purpose, keys, latents.shape[1:]), latents.device)


def noise_levels(settings: FlowSettings, keys: Sequence[int], latents: Tensor) -> Tensor:
    """Returns the noise levels, sigma (B,) float32 in [0, 1], that latents (B,C,H,W) are trained at."""
    uniform = keyed_random.uniform("sigma, uniform", keys, ())
    normal = keyed_random.normal("sigma, normal", keys, ())
    return copied_to(flow.sample_sigma(settings, uniform, normal, *latents.shape[-2:]), latents.device)


def input_noise(settings: FlowSettings, keys: Sequence[int], noise: Tensor) -> Tensor:
    """Returns the noise (B,C,H,W) of the model's input, given that of the target: others under input perturbation."""
    gamma = settings.ip_noise_gamma
    if not gamma:
        return noise
    extra = noise_of("input perturbation", keys, noise)
    strength = keyed_random.uniform("input perturbation strength", keys, ()) * gamma
    if not settings.ip_noise_gamma_random_strength:
        strength = strength.new_full(strength.shape, gamma)
    return flow.perturbed_noise(noise, extra, copied_to(strength, noise.device))
