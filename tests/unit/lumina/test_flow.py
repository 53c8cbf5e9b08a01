"""Noise levels, noising, targets and losses."""

import json
import math
from pathlib import Path

import pytest
import torch

from library.errors import SettingsError
from library.lumina import flow
from library.lumina.settings import FlowSettings

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "sigma_sampling.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['mode']}-{case['latent_h']}x{case['latent_w']}")
def test_sigma_equals_the_recorded_ones(case: dict) -> None:
    settings = FlowSettings(
        timestep_sampling=case["mode"],
        sigmoid_scale=case["sigmoid_scale"],
        discrete_flow_shift=case["discrete_flow_shift"],
    )
    sigma = flow.sample_sigma(
        settings,
        torch.tensor(case["uniform_draw"]),
        torch.tensor(case["normal_draw"]),
        case["latent_h"],
        case["latent_w"],
    )
    # The recorded 'sigma' mode steps through a float32 table of 1000 entries; the others are the same formula.
    tolerance = 1e-3 if case["mode"] == "sigma" else 1e-6
    torch.testing.assert_close(sigma, torch.tensor(case["sigma"]), atol=tolerance, rtol=0)


@pytest.mark.parametrize("mode", ["sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"])
def test_timestep_range_is_kept(mode: str) -> None:
    settings = FlowSettings(timestep_sampling=mode, min_timestep=200, max_timestep=400)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(2000, generator=generator), torch.randn(2000, generator=generator)
    sigma = flow.sample_sigma(settings, uniform, normal, 64, 64)
    assert 0.2 <= sigma.min() < 0.25  # reaches the ends: the distribution is squeezed, not cut
    assert 0.35 < sigma.max() <= 0.4
    assert sigma.dtype == torch.float32


@pytest.mark.parametrize(("scheme", "mean"), [("logit_normal", 0.5), ("mode", 0.5)])
def test_densities_of_sigma_mode(scheme: str, mean: float) -> None:
    settings = FlowSettings(timestep_sampling="sigma", weighting_scheme=scheme, discrete_flow_shift=1.0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(20000, generator=generator), torch.randn(20000, generator=generator)
    sigma = flow.sample_sigma(settings, uniform, normal, 64, 64)
    # Both densities are symmetric about 1/2; 20000 draws have a standard error below 0.002.
    assert abs(sigma.mean() - mean) < 0.01
    middle = ((sigma - 0.5).abs() < 0.1).float().mean()
    assert middle > 0.22  # more than uniform's 0.2 near the middle


def _example(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    latents, noise, velocity = (torch.randn(3, 4, 6, 6, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.2, 0.5, 0.9])
    return latents, noise, velocity, sigma, flow.add_noise(latents, noise, sigma)


def test_noise_ends() -> None:
    latents, noise, *_ = _example()
    assert torch.equal(flow.add_noise(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(flow.add_noise(latents, noise, torch.ones(3)), noise)


@pytest.mark.parametrize("prediction", ["raw", "additive", "sigma_scaled"])
def test_the_true_velocity_has_no_loss(prediction: str) -> None:
    latents, noise, _, sigma, noisy = _example()
    settings = FlowSettings(model_prediction_type=prediction)  # type: ignore[arg-type]
    loss = flow.loss_map(settings, latents - noise, latents, noise, noisy, sigma)
    assert loss.max() < 1e-10  # rounding of float32 squared


def test_sigma_scaled_is_raw_weighted_by_sigma_squared() -> None:
    latents, noise, velocity, sigma, noisy = _example()
    raw = flow.loss_map(FlowSettings(), velocity, latents, noise, noisy, sigma)
    scaled = flow.loss_map(FlowSettings(model_prediction_type="sigma_scaled"), velocity, latents, noise, noisy, sigma)
    # Differences of float32 numbers of size 1 are compared after squaring.
    torch.testing.assert_close(scaled, raw * sigma.view(-1, 1, 1, 1) ** 2, atol=1e-5, rtol=1e-4)
    undone = flow.loss_map(
        FlowSettings(model_prediction_type="sigma_scaled", weighting_scheme="sigma_sqrt"),
        velocity,
        latents,
        noise,
        noisy,
        sigma,
    )
    torch.testing.assert_close(undone, raw, atol=1e-4, rtol=1e-4)


def test_additive_has_raws_gradient() -> None:
    latents, noise, velocity, sigma, noisy = _example()
    gradients = []
    for prediction in ("raw", "additive"):
        leaf = velocity.clone().requires_grad_()
        settings = FlowSettings(model_prediction_type=prediction)  # type: ignore[arg-type]
        flow.loss_map(settings, leaf, latents, noise, noisy, sigma).mean().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_losses_lie_between_l1_and_l2(schedule: str) -> None:
    latents, noise, velocity, sigma, noisy = _example()
    settings = FlowSettings(loss_type="huber", huber_schedule=schedule)  # type: ignore[arg-type]
    threshold = flow.huber_threshold(settings, sigma)
    difference = velocity - (latents - noise)
    c = threshold.view(-1, 1, 1, 1)
    loss = flow.loss_map(settings, velocity, latents, noise, noisy, sigma)
    assert (loss <= difference**2 + 1e-6).all()  # below the square it approaches for small differences
    assert (loss <= 2 * c * difference.abs() + 1e-6).all()  # and below its asymptote for large ones


def test_huber_thresholds_by_hand() -> None:
    sigma = torch.tensor([0.0, 0.5, 1.0])
    exponential = flow.huber_threshold(FlowSettings(loss_type="huber", huber_schedule="exponential"), sigma)
    torch.testing.assert_close(exponential, torch.tensor([1.0, math.sqrt(0.1), 0.1]))
    snr = flow.huber_threshold(FlowSettings(loss_type="huber", huber_schedule="snr"), sigma)
    torch.testing.assert_close(snr, torch.tensor([1.0, 0.9 * 0.25 + 0.1, 0.1]))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep"),
        ({"max_timestep": 1001}, "1000"),
        ({"discrete_flow_shift": 0.0}, "--discrete_flow_shift"),
        ({"weighting_scheme": "mode"}, "--weighting_scheme mode"),
        ({"weighting_scheme": "cosmap"}, "sigma_scaled"),
        ({"ip_noise_gamma_random_strength": True}, "--ip_noise_gamma"),
    ],
)
def test_contradictions_are_refused(values: dict, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        FlowSettings(**values)
