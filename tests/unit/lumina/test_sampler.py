"""Schedule, guidance and Euler steps, against a velocity field whose path is known."""

import pytest
import torch

from library.lumina.sampler import (
    Conditioning,
    SamplingOptions,
    goes_together,
    guide,
    guided_steps,
    initial_noise,
    sample,
    sigma_schedule,
)

PROMPT = Conditioning(torch.ones(1, 3, 2))
NEGATIVE = Conditioning(torch.zeros(1, 2, 2))


def test_schedule_is_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=6.0)
    theirs.set_timesteps(sigmas=torch.linspace(1.0, 1 / 30, 30).tolist())
    # Theirs shifts in float32.
    torch.testing.assert_close(sigma_schedule(30, 6.0), theirs.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 36])
def test_schedule_falls_from_one_to_zero(steps: int) -> None:
    sigmas = sigma_schedule(steps, 6.0)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_guidance_takes_part_in_24_of_36_steps() -> None:
    assert sum(guided_steps(sigma_schedule(36, 6.0), SamplingOptions())) == 24
    assert not any(guided_steps(sigma_schedule(36, 6.0), SamplingOptions(guidance_scale=1.0)))
    assert all(guided_steps(sigma_schedule(36, 6.0), SamplingOptions(cfg_trunc_ratio=1.0)))


def test_straight_field_ends_at_its_target() -> None:
    target = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    noise = initial_noise([0], 16, 32, 32)
    for steps in (1, 7):
        latents = sample(
            lambda *_: target - noise, noise, PROMPT, NEGATIVE, SamplingOptions(steps=steps, guidance_scale=1.0)
        )
        torch.testing.assert_close(latents, target, atol=1e-5, rtol=0)  # float32 sums of seven steps


@pytest.mark.parametrize(("device", "together"), [("cpu", False), ("cuda", True), ("mps", True)])
def test_a_cpu_predicts_in_two_passes(device: str, together: bool) -> None:
    assert goes_together(torch.device(device)) is together


def test_on_a_cpu_the_negative_prompt_has_a_pass_of_its_own_without_padding() -> None:
    calls: list[tuple[int, int]] = []

    def predict(latents: torch.Tensor, time: torch.Tensor, features: torch.Tensor, mask: object) -> torch.Tensor:
        assert len(latents) == len(time) == len(features)
        assert mask is None
        calls.append((len(latents), features.shape[1]))
        return torch.zeros_like(latents)

    sample(predict, initial_noise([0], 16, 16, 16), PROMPT, NEGATIVE, SamplingOptions(steps=9))
    # Six of nine steps are guided; in the others the negative prompt is really left out.
    assert calls == [(1, 3), (1, 2)] * 6 + [(1, 3)] * 3


def test_negative_prompt_takes_part_in_the_same_forward_where_it_acts() -> None:
    calls: list[tuple[float, int, object]] = []

    def predict(latents: torch.Tensor, time: torch.Tensor, features: torch.Tensor, mask: object) -> torch.Tensor:
        assert len(latents) == len(time) == len(features)
        calls.append((float(time[0]), len(latents), mask))
        return torch.zeros_like(latents)

    steps: list[int] = []
    options = SamplingOptions(steps=9)
    noise = initial_noise([0], 16, 16, 16)
    sample(predict, noise, PROMPT, NEGATIVE, options, lambda: steps.append(1), together=True)
    assert len(steps) == len(calls) == 9
    guided = [(time, mask) for time, rows, mask in calls if rows == 2]
    assert len(guided) == 6
    assert max(time for time, _ in guided) < 0.25
    assert all(mask.tolist() == [[True] * 3, [True, True, False]] for _, mask in guided)
    assert all(mask is None for _, rows, mask in calls if rows == 1)


def test_captions_of_one_length_need_no_mask() -> None:
    both = PROMPT.beside(PROMPT)
    assert both.mask is None
    assert both.features.shape == (2, 3, 2)
    masked = Conditioning(torch.ones(1, 3, 2), torch.tensor([[True, True, False]]))
    joint = PROMPT.beside(masked)
    assert joint.mask is not None
    assert joint.mask.tolist() == [[True] * 3, [True, True, False]]
    longer = masked.beside(Conditioning(torch.ones(1, 4, 2)))
    assert longer.mask is not None
    assert longer.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert longer.features[0, 3].tolist() == [0, 0]


def test_each_picture_of_a_batch_is_guided_and_renormalised_alone() -> None:
    def predict(latents: torch.Tensor, time: torch.Tensor, features: torch.Tensor, mask: object) -> torch.Tensor:
        return latents * features.mean(dim=(1, 2))[:, None, None, None]

    prompts, negatives = (torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    noise, options = initial_noise([5, 0, 7], 4, 32, 16), SamplingOptions(steps=6, renorm_cfg=0.9)
    together = sample(predict, noise, Conditioning(prompts), Conditioning(negatives), options, together=True)
    for row in range(3):
        part = slice(row, row + 1)
        alone = sample(predict, noise[part], Conditioning(prompts[part]), Conditioning(negatives[part]), options)
        torch.testing.assert_close(together[part], alone, atol=1e-6, rtol=1e-6)  # float32 sums in another order


def test_guide_by_hand() -> None:
    conditional = torch.zeros(1, 1, 1, 2) + torch.tensor([3.0, 4.0])
    negative = torch.zeros_like(conditional)
    torch.testing.assert_close(guide(conditional, negative, 2.0, 0.0), conditional * 2)
    torch.testing.assert_close(guide(conditional, negative, 2.0, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, negative, 2.0, 1.5), conditional * 1.5)
    # A guided prediction below the limit is not scaled up.
    torch.testing.assert_close(guide(conditional, negative, 0.5, 1.0), conditional * 0.5)
    assert torch.equal(guide(conditional, conditional.clone(), 3.5, 1.0), conditional)
    assert guide(negative, negative, 2.0, 1.0).isfinite().all()


def test_norm_is_over_the_whole_latent_of_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    conditional, negative = (torch.randn(2, 4, 3, 5, generator=generator) for _ in range(2))
    guided = guide(conditional, negative, 4.0, 1.0)
    for row in range(2):
        torch.testing.assert_close(guided[row].norm(), conditional[row].norm())
    torch.testing.assert_close(guided[1:], guide(conditional[1:], negative[1:], 4.0, 1.0))


def test_seed_zero_is_a_seed() -> None:
    assert torch.equal(initial_noise([0], 16, 64, 48), initial_noise([0], 16, 64, 48))
    assert initial_noise([0], 16, 64, 48).shape == (1, 16, 6, 8)
    assert not torch.equal(initial_noise([0], 16, 64, 48), initial_noise([1], 16, 64, 48))
    both = initial_noise([1, 0], 16, 64, 48)
    assert torch.equal(both[1:], initial_noise([0], 16, 64, 48))
