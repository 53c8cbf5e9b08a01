"""Noise and noise levels belong to a sample, whatever batch it is in."""

from typing import Any

import pytest
import torch

from library.lumina.settings import FlowSettings
from library.training.noise import input_noise, noise_levels, noise_of

KEYS = [11, 12, 13]
LATENTS = torch.zeros(3, 16, 8, 6)
PERTURBED: list[dict[str, Any]] = [
    {"ip_noise_gamma": 0.3},
    {"ip_noise_gamma": 0.3, "ip_noise_gamma_random_strength": True},
]


def test_noise_is_of_the_key_and_the_purpose() -> None:
    noise = noise_of("noise", KEYS, LATENTS)
    assert (noise.shape, noise.dtype) == (LATENTS.shape, torch.float32)
    assert torch.equal(noise_of("noise", KEYS[1:2], LATENTS[:1])[0], noise[1])
    assert not torch.equal(noise_of("validation noise", KEYS, LATENTS), noise)


@pytest.mark.parametrize("sampling", ["uniform", "nextdit_shift", "sigmoid"])
def test_levels_are_of_the_key_and_within_the_range(sampling: Any) -> None:
    settings = FlowSettings(timestep_sampling=sampling, min_timestep=200, max_timestep=600)
    keys = list(range(100))
    latents = LATENTS[:1].expand(100, -1, -1, -1)
    levels = noise_levels(settings, keys, latents)
    assert torch.equal(noise_levels(settings, keys[7:8], latents[:1])[0], levels[7])
    assert 0.2 <= float(levels.min()) < float(levels.max()) <= 0.6


def test_without_perturbation_the_input_has_the_noise_of_the_target() -> None:
    noise = noise_of("noise", KEYS, LATENTS)
    assert input_noise(FlowSettings(), KEYS, noise) is noise


@pytest.mark.parametrize("flags", PERTURBED, ids=["fixed", "random"])
def test_perturbation_is_of_the_key_and_as_strong_as_asked(flags: dict[str, Any]) -> None:
    settings, noise = FlowSettings(**flags), noise_of("noise", KEYS, LATENTS)
    extra = input_noise(settings, KEYS, noise) - noise
    alone = input_noise(settings, KEYS[2:], noise[2:]) - noise[2:]
    assert torch.equal(alone[0], extra[2])
    # Of 768 numbers the deviation is known to 1 / sqrt(2 * 768), that is 2.6 %; four times that.
    strengths = extra.flatten(1).std(dim=1) / 0.3
    if settings.ip_noise_gamma_random_strength:
        assert len(set(strengths.tolist())) == 3
        assert float(strengths.max()) < 1.1
    else:
        torch.testing.assert_close(strengths, torch.ones(3), rtol=0, atol=0.1)
