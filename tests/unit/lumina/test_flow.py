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


# defect 9
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


# defect 34
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


def test_losses_by_hand() -> None:
    difference = torch.tensor([-2.0, 0.0, 0.5]).view(3, 1, 1, 1)
    zero, sigma = torch.zeros_like(difference), torch.tensor([0.0, 0.5, 1.0])
    root = math.sqrt(0.25 + 0.2**2)
    expected = {
        "l2": [4.0, 0.0, 0.25],
        "l1": [2.0, 0.0, 0.5],
        # c = huber_c * huber_scale = 0.2 at every noise level
        "huber": [2 * 0.2 * (math.sqrt(4 + 0.2**2) - 0.2), 0.0, 2 * 0.2 * (root - 0.2)],
        "smooth_l1": [2 * (math.sqrt(4 + 0.2**2) - 0.2), 0.0, 2 * (root - 0.2)],
    }
    for name, values in expected.items():
        settings = FlowSettings(loss_type=name, huber_schedule="constant", huber_c=0.1, huber_scale=2.0)  # type: ignore[arg-type]
        found = flow.loss_between(settings, difference, zero, sigma).flatten()
        torch.testing.assert_close(found, torch.tensor(values))  # float32 rounding


@pytest.mark.parametrize("name", ["huber", "smooth_l1"])
def test_huber_works_with_the_schedule_of_the_default(name: str) -> None:
    """defect 33"""
    latents, noise, velocity, sigma, noisy = _example()
    leaf = velocity.clone().requires_grad_()
    flow.loss_map(FlowSettings(loss_type=name), leaf, latents, noise, noisy, sigma).mean().backward()  # type: ignore[arg-type]
    assert leaf.grad is not None
    assert bool(torch.isfinite(leaf.grad).all())


def test_clocks_are_not_rounded() -> None:
    """defect 12: timesteps in bfloat16 are multiples of 4 above 512."""
    sigma = torch.tensor([0.6003, 0.6017, 0.9991])
    assert flow.lumina_time(sigma).dtype == torch.float32
    assert torch.equal(flow.lumina_time(sigma), 1 - sigma)
    latents = torch.zeros(3, 1, 1, 1, dtype=torch.bfloat16)
    noisy = flow.add_noise(latents, torch.ones_like(latents), sigma)
    assert torch.equal(noisy.flatten(), sigma)


def test_masked_means_by_hand() -> None:
    loss = torch.arange(1.0, 9.0).view(1, 2, 2, 2).repeat(4, 1, 1, 1)  # channels 1 2 3 4 and 5 6 7 8, mean 4.5
    masks = torch.tensor(
        [
            [[1.0, 1.0], [1.0, 1.0]],
            [[1.0, 0.0], [0.0, 0.0]],  # lets 1 and 5 through
            [[0.0, 0.5], [0.0, 0.5]],  # half of 2, 4, 6 and 8
            [[0.0, 0.0], [0.0, 0.0]],
        ]
    )
    assert flow.mean_of_samples(loss).tolist() == [4.5] * 4
    assert flow.mean_of_samples(loss, masks).tolist() == [4.5, 6 / 8, 10 / 8, 0.0]
    assert flow.mean_of_samples(loss, masks, by_area=True).tolist() == [4.5, 3.0, 5.0, 0.0]


def test_an_empty_mask_has_a_gradient_of_zero() -> None:
    loss = torch.ones(1, 2, 2, 2, requires_grad=True)
    flow.mean_of_samples(loss, torch.zeros(1, 2, 2), by_area=True).sum().backward()
    assert loss.grad is not None
    assert not loss.grad.any()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep"),
        ({"max_timestep": 0}, "--min_timestep 0 and --max_timestep 0 give no range"),
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
