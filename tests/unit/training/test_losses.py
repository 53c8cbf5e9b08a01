"""The loss of a training step: masks, difference output preservation, and the fixed losses of validation."""

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from e2e_helpers import Job, make_job
from trainer_helpers import fill_network, gradients, made_trainer

from library import keyed_random
from library.data.config import DatasetConfig, SubsetConfig
from library.data.items import Batch
from library.errors import SettingsError
from library.lumina import flow
from library.training.output_preservation import check_can_be_switched_off, warn_where_nothing_is_learned

DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
enable_bucket = false
batch_size = 5
[[datasets.subsets]]
image_dir = '{pictures}'
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def flags(job: Job, folder: Path, *more: str) -> list[str]:
    (folder / "data.toml").write_text(DATASET.format(pictures=job.pictures), encoding="utf-8")
    given = [flag for flag in job.train_flags(folder / "out", *more) if not flag.startswith("--train_data_dir")]
    return [*given, f"--dataset_config={folder / 'data.toml'}"]


def first_batch(trainer: Any, preserves: tuple[int, ...] = ()) -> Batch:
    """Returns the first batch of five pictures, of which some preserve their output."""
    batch = trainer.data.load(trainer.data.plan_epoch(1, 1).batch(0).draws)
    draws = list(batch.draws)
    for index in preserves:
        subset = dataclasses.replace(draws[index].item.subset, custom_attributes={"diff_output_preservation": True})
        draws[index] = dataclasses.replace(draws[index], item=dataclasses.replace(draws[index].item, subset=subset))
    return dataclasses.replace(batch, draws=tuple(draws))


def noisy_of(trainer: Any, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Returns latents, noise, sigma and noisy latents as the trainer draws them."""
    keys = [draw.key for draw in batch.draws]
    latents = trainer.latents_of(batch)
    noise = keyed_random.normal("noise", keys, latents.shape[1:])
    uniform, normal = (keyed_random.uniform("sigma, uniform", keys, ()), keyed_random.normal("sigma, normal", keys, ()))
    sigma = flow.sample_sigma(trainer.config.flow, uniform, normal, *latents.shape[-2:])
    return latents, noise, sigma, flow.add_noise(latents, noise, sigma)


CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "gemma2 trained too"])
@pytest.mark.parametrize("prediction", ["raw", "sigma_scaled"])
def test_preserved_output_has_the_gradient_of_a_computation_by_hand(
    job: Job, tmp_path: Path, caching: bool, prediction: str
) -> None:
    """defect 23: targets with gradients, and with the text encoder's LoRA in them."""
    more = [*(CACHED if caching else []), f"--model_prediction_type={prediction}", "--network_dropout=0.2"]
    trainer = made_trainer(flags(job, tmp_path, *more))
    fill_network(trainer.network)
    preserves = (1, 3)
    batch = first_batch(trainer, preserves)

    losses, sigma = trainer.losses_of(batch)
    losses.sum().backward()
    found = gradients(trainer.network)

    latents, noise, expected_sigma, noisy = noisy_of(trainer, batch)
    assert torch.equal(sigma, expected_sigma)
    # By hand: a copy of the models that never had a network gives the targets, kept as plain numbers.
    plain = made_trainer(flags(job, tmp_path, *more), last="load_models")
    with torch.no_grad():
        features = plain.caption_features(batch, preserves)
        base = plain._velocity(noisy[list(preserves)], sigma[list(preserves)], features)
    target = latents - noise
    for place, index in enumerate(preserves):
        target[index] = base[place].float()
    velocity = trainer._velocity(noisy, sigma, trainer.caption_features(batch))
    # With sigma_scaled both sides are x + sigma * velocity, so that the difference is sigma times raw's.
    factor = sigma.view(-1, 1, 1, 1) if prediction == "sigma_scaled" else 1
    by_hand = ((factor * (velocity - target)) ** 2).mean(dim=(1, 2, 3))
    by_hand.sum().backward()
    expected = gradients(trainer.network)

    # x + sigma * v - (x + sigma * v0) loses digits of numbers of size 1 to 3 that are squared; raw has the same bits.
    tolerance = 0.0 if prediction == "raw" else 1e-4
    torch.testing.assert_close(losses, by_hand, rtol=tolerance, atol=tolerance)
    assert found.keys() == expected.keys()
    for name in found:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance * scale, msg=name)
    if not caching:
        assert any(name.startswith("lora_te") and bool(value.any()) for name, value in found.items())


def test_the_target_of_preserved_samples_is_the_network_switched_off(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """defect 23: one more forward pass without gradients, of those samples alone, and then the network is on again."""
    trainer = made_trainer(flags(job, tmp_path, "--gradient_checkpointing"))
    fill_network(trainer.network)
    calls: list[tuple[int, float, bool]] = []
    outputs = []
    forward = trainer.dit.forward

    def watched(noisy: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        calls.append((len(noisy), trainer.network.multiplier, torch.is_grad_enabled()))
        outputs.append(forward(noisy, *rest))
        return outputs[-1]

    monkeypatch.setattr(trainer.dit, "forward", watched)
    batch = first_batch(trainer, preserves=(0, 2))
    _, sigma = trainer.losses_of(batch)
    assert calls == [(2, 0.0, False), (5, 1.0, True)]
    assert not outputs[0].requires_grad
    assert trainer.network.multiplier == 1.0

    *_, noisy = noisy_of(trainer, batch)
    plain = made_trainer(flags(job, tmp_path), last="load_models")
    with torch.no_grad():
        features = plain.caption_features(batch, (0, 2))
        assert torch.equal(outputs[0], plain._velocity(noisy[[0, 2]], sigma[[0, 2]], features))

    calls.clear()
    trainer.losses_of(first_batch(trainer))
    assert calls == [(5, 1.0, True)]


def test_a_network_that_cannot_be_switched_off_is_refused(job: Job, tmp_path: Path) -> None:
    trainer = made_trainer(flags(job, tmp_path, *CACHED), last="build_data")
    (config,) = trainer.data.datasets
    subset = dataclasses.replace(config.subsets[0], custom_attributes={"diff_output_preservation": True})
    asking = [dataclasses.replace(config, subsets=(subset,))]
    check_can_be_switched_off(torch.nn.Identity(), [config], "other.module")
    with pytest.raises(SettingsError, match=r"other\.module cannot"):
        check_can_be_switched_off(torch.nn.Identity(), asking, "other.module")


def test_a_multiplier_that_does_not_switch_all_off(tmp_path: Path) -> None:
    """LyCORIS' DoRA keeps the direction that its factors give a weight."""
    subset = SubsetConfig(image_dir=tmp_path, custom_attributes={"diff_output_preservation": True})
    asking = [DatasetConfig(subsets=(subset,), resolution=(64, 64))]
    network = torch.nn.Sequential(torch.nn.Identity())
    network.set_multiplier = lambda multiplier: None  # type: ignore[assignment]
    check_can_be_switched_off(network, asking, "other.module")
    network[0].wd = True  # type: ignore[assignment]
    with pytest.raises(SettingsError, match="dora_wd"):
        check_can_be_switched_off(network, asking, "other.module")


def test_a_run_that_only_preserves_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    learned = SubsetConfig(image_dir=Path("a"))
    preserved = SubsetConfig(image_dir=Path("b"), custom_attributes={"diff_output_preservation": True})
    warn_where_nothing_is_learned([DatasetConfig(subsets=(preserved, learned), resolution=(64, 64))])
    assert caplog.messages == []
    warn_where_nothing_is_learned([DatasetConfig(subsets=(preserved,), resolution=(64, 64))])
    assert "only taught to change nothing" in caplog.text


class PlainNetwork(torch.nn.Module):
    """A third party's network without a multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.some = torch.nn.Parameter(torch.zeros(1))

    def apply_to(self, *_: Any) -> None:
        pass


def test_a_run_with_such_a_network_ends_before_training(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("plain_network")
    module.__spec__ = ModuleSpec("plain_network", None)
    module.create_network = lambda *args, **kwargs: PlainNetwork()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plain_network", module)
    argv = [*flags(job, tmp_path, *CACHED), "--network_module=plain_network"]
    made_trainer(argv, last="build_network")
    with (tmp_path / "data.toml").open("a", encoding="utf-8") as file:
        file.write("custom_attributes = { diff_output_preservation = true }\n")
    with pytest.raises(SettingsError, match="diff_output_preservation"):
        made_trainer(argv, last="build_network")


@pytest.mark.parametrize("by_area", [False, True])
def test_masks_weigh_the_loss(job: Job, tmp_path: Path, by_area: bool) -> None:
    more = [*CACHED, *(["--normalize_masked_loss"] if by_area else [])]
    trainer = made_trainer(flags(job, tmp_path, *more))
    fill_network(trainer.network)
    batch = first_batch(trainer)
    masks = torch.ones(5, 8, 8)
    masks[1] = 0
    masks[2] = 0.5
    masks[3, :, :2] = 0
    plain, _ = trainer.losses_of(batch)
    masked, _ = trainer.losses_of(dataclasses.replace(batch, masks=masks))
    assert torch.equal(masked[0], plain[0])  # a picture without a mask counts as before, to the bit
    assert masked[1] == 0
    # Halving is exact; dividing by the area again rounds once.
    torch.testing.assert_close(masked[2], plain[2] * (1.0 if by_area else 0.5))
    assert 0 < masked[3] != plain[3]
    masked.sum().backward()
    assert all(bool(torch.isfinite(value).all()) for value in gradients(trainer.network).values())


def test_validation_losses_are_fixed(job: Job, tmp_path: Path) -> None:
    """defects 10 and 68: the same each time, of the picture alone, and without a trace in the training."""
    trainer = made_trainer(flags(job, tmp_path, *CACHED, "--network_dropout=0.5", "--ip_noise_gamma=0.5"))
    fill_network(trainer.network)
    trainer.network.eval()
    batch = first_batch(trainer, preserves=(0,))
    masked = dataclasses.replace(batch, masks=torch.zeros(5, 8, 8), loss_weights=torch.zeros(5))
    first, again = (trainer.validation_losses(each, (0.25, 0.75)) for each in (batch, masked))
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert first.shape == (5, 2)
    # By hand for one level: the noise belongs to the draw, not to the batch or the level.
    latents = trainer.latents_of(batch)
    noise = keyed_random.normal("validation noise", [draw.key for draw in batch.draws], latents.shape[1:])
    sigma = torch.full((5,), 0.75)
    noisy = flow.add_noise(latents, noise, sigma)
    with torch.no_grad():
        velocity = trainer._velocity(noisy, sigma, trainer.caption_features(batch))
    by_hand = ((velocity - (latents - noise)) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(first[:, 1], by_hand, rtol=0, atol=0)
    # Alone or among others: only the order of float32 sums differs.
    alone = trainer.validation_losses(trainer.data.load(batch.draws[3:4]), (0.25, 0.75))
    torch.testing.assert_close(alone[0], first[3], rtol=1e-5, atol=1e-6)


def test_recomputing_in_gemma2_trains_nothing_but_the_lora(job: Job, tmp_path: Path) -> None:
    # defect 22
    trainer = made_trainer(flags(job, tmp_path, "--gradient_checkpointing"))
    fill_network(trainer.network)
    trainer.losses_of(first_batch(trainer)).values.mean().backward()
    encoder = trainer.ready_text_encoder().model
    assert not any(parameter.requires_grad for parameter in (*encoder.parameters(), *trainer.dit.parameters()))
    assert all(parameter.grad is None for parameter in (*encoder.parameters(), *trainer.dit.parameters()))
    trained = gradients(trainer.network)
    assert any(name.startswith("lora_te") and bool(gradient.any()) for name, gradient in trained.items())
