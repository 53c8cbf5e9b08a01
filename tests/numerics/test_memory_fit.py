"""What ``--vram_gb`` expects of a step is what the step needs, and the flags it takes are the fastest that fit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import Job, make_job
from trainer_helpers import fresh_accelerate, made_trainer

from library.errors import SettingsError
from library.memory.fit import GIB, Allowance, Need, Row
from library.memory.live_bytes import LiveBytes, bytes_of
from library.memory.rehearsal import RehearsedAttention
from library.training import memory_fit
from library.training.arguments import parse_arguments
from lumina_train_network import LuminaNetworkTrainer

CPU = torch.device("cpu")
NOTHING = Allowance(0.0, 0.0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


Prepared = Callable[..., Any]


@pytest.fixture
def prepared(job: Job, tmp_path: Path) -> Prepared:
    """Makes a trainer that knows its data and has read no model."""

    def make(*more: str, last: str = "build_data") -> Any:
        caches = ("--cache_latents", "--cache_text_encoder_outputs")
        flags = job.train_flags(tmp_path / "out", *caches, "--train_batch_size=2", "--network_alpha=4", *more)
        return made_trainer(flags, last)

    return make


@pytest.mark.parametrize("level", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "precision", [[], ["--mixed_precision=bf16"], ["--fp8_base_unet"]], ids=["fp32", "bf16", "fp8"]
)
def test_a_real_step_needs_what_was_expected(prepared: Prepared, level: str, precision: list[str]) -> None:
    flags = [] if level == "none" else ["--gradient_checkpointing", f"--gradient_checkpointing_level={level}"]
    trainer = prepared(*flags, *precision, last="cache_text")
    batch = memory_fit.largest_batch(trainer)
    need = memory_fit.rehearse(trainer, Row(trainer.config.quantisation.transformer, level), batch)

    counter = LiveBytes(CPU)
    trainer.attention = dataclasses.replace(trainer.attention, function=RehearsedAttention(counter, expands=True))
    trainer.load_models()
    assert need.weights == bytes_of((*trainer.dit.parameters(), *trainer.dit.buffers()), CPU)
    text = tuple(torch.zeros(feature.shape, dtype=feature.dtype) for feature in batch.text)
    real = dataclasses.replace(batch, latents=torch.zeros(batch.latents.shape).bfloat16(), text=text)
    with counter:
        trainer.build_network()
        optimizer = memory_fit.optimizer_with_states(trainer.network)
        counter.reset_peak()
        memory_fit.one_step(trainer, real, optimizer, counter)
    # What is already on the CPU is not copied to the device: noise and target in float32, that is four times the latents.
    assert 0 <= need.step - counter.peak <= 5 * real.latents.nbytes


def needs(trainer: Any, batch: Any, kind: Any = None) -> dict[tuple[str, bool], Need]:
    return {
        (level, offload): memory_fit.rehearse(trainer, Row(kind, level, offload), batch)
        for level in ("none", "selective", "full")
        for offload in (False, True)
    }


def test_each_flag_saves_and_larger_batches_need_more(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.memory import activation_offload

    monkeypatch.setattr(activation_offload.ActivationOffload.__init__, "__defaults__", ((), 1024, 4096))
    trainer = prepared()
    batch = memory_fit.largest_batch(trainer)
    found = needs(trainer, batch)
    plain, full = found["none", False], found["full", False]
    assert full.step < found["selective", False].step < plain.step
    assert full.backward_s > found["selective", False].backward_s > plain.backward_s
    assert found["none", True].step < plain.step
    assert found["full", True].step <= full.step
    assert full.backward_s > plain.backward_s
    assert full.forward_s == plain.forward_s
    assert found["none", True].out > found["full", True].out > 0
    assert plain.out == 0
    fp8 = needs(trainer, batch, "fp8")["none", False]
    assert fp8.weights < plain.weights
    assert sum(fp8.blocks) < sum(plain.blocks)
    one = dataclasses.replace(
        batch, draws=batch.draws[:1], latents=batch.latents[:1], text=batch.text[:1], loss_weights=torch.ones(1)
    )
    assert memory_fit.rehearse(trainer, Row(), one).step < plain.step


def test_trained_parts_are_counted(prepared: Prepared) -> None:
    small, large = (prepared(f"--network_dim={rank}") for rank in (4, 8))
    need, larger = (memory_fit.rehearse(one, Row(), memory_fit.largest_batch(one)) for one in (small, large))
    assert larger.trained > need.trained
    averaged = prepared("--network_dim=8", "--ema_decay=0.99")
    with_average = memory_fit.rehearse(averaged, Row(), memory_fit.largest_batch(averaged))
    assert with_average.trained > larger.trained


def test_gemma2_and_the_autoencoder_count_where_they_are_not_let_go(prepared: Prepared) -> None:
    cached = prepared()
    batch = memory_fit.largest_batch(cached)
    need = memory_fit.rehearse(cached, Row(), batch)
    trains_text = prepared("--cache_text_encoder_outputs=false")
    with_text = memory_fit.rehearse(trains_text, Row(), memory_fit.largest_batch(trains_text))
    gemma2 = trains_text.rehearse_text_encoder(torch.float32, memory_fit._reading(None)).model
    assert with_text.weights - need.weights == bytes_of(gemma2.parameters(), memory_fit.META) + bytes_of(
        gemma2.buffers(), memory_fit.META
    )
    assert with_text.trained > need.trained
    assert with_text.step > need.step
    uncached = prepared("--cache_latents=false")
    with_ae = memory_fit.rehearse(uncached, Row(), memory_fit.largest_batch(uncached))
    assert with_ae.weights - need.weights == 4 * uncached.autoencoder_numbers()


def test_the_largest_batch(prepared: Prepared) -> None:
    trainer = prepared()
    batch = memory_fit.largest_batch(trainer)
    sizes = {item.bucket_px for item in trainer.data.items}
    width, height = batch.draws[0].item.bucket_px
    assert (width, height) in sizes
    assert batch.latents.shape == (len(batch.draws), 16, height // 8, width // 8)


# ---- the choice ----


def chosen(trainer: Any, limit_gib: float, allowance: Allowance = NOTHING) -> tuple[Any, Any]:
    batch = memory_fit.largest_batch(trainer)
    fit = memory_fit.Fit(trainer, batch, limit_gib, allowance, "--vram_gb 1")
    return fit.settings(fit.choose())


@pytest.fixture
def no_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models' Gemma2 and autoencoder need more than the training of the tiny Next-DiT."""
    monkeypatch.setattr(memory_fit.Fit, "_encoding_gib", lambda *arguments: 0.0)


@pytest.mark.usefixtures("no_caching")
def test_a_large_card_needs_no_flag_and_a_smaller_one_does(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = prepared()
    batch = memory_fit.largest_batch(trainer)
    exact = needs(trainer, batch)
    plain, least = exact["none", False].bytes_with(0), exact["full", True].bytes_with(len(exact["full", True].blocks))
    with caplog.at_level(logging.INFO):
        memory, quantisation = chosen(trainer, plain / GIB)
    assert not any((memory.gradient_checkpointing, memory.blocks_to_swap, memory.cpu_offload_checkpointing))
    assert quantisation.transformer is None
    assert "fastest is no memory flag" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        memory, quantisation = chosen(trainer, (plain - 1) / GIB)
    assert memory.gradient_checkpointing or memory.blocks_to_swap
    assert quantisation.transformer is None
    assert "--gradient_checkpointing" in caplog.text
    caplog.clear()
    memory, quantisation = chosen(trainer, (least - 1) / GIB)
    assert quantisation.transformer == "fp8"
    assert "low_precision.md" in caplog.text
    with pytest.raises(
        SettingsError, match=r"--vram_gb 1: .*does not fit.*the least that it needs.*lower --resolution"
    ):
        chosen(trainer, 1e-6)


@pytest.mark.usefixtures("no_caching")
def test_given_flags_stay(prepared: Prepared) -> None:
    memory, _ = chosen(prepared("--gradient_checkpointing"), 100.0)
    assert memory.gradient_checkpointing
    memory, _ = chosen(prepared("--blocks_to_swap=1", "--cpu_offload_checkpointing"), 100.0)
    assert memory.blocks_to_swap == 1
    assert memory.cpu_offload_checkpointing
    _, quantisation = chosen(prepared("--fp8_base"), 100.0)
    assert quantisation.fp8_base


def test_filling_the_caches_has_to_fit_too(prepared: Prepared) -> None:
    trainer = prepared()
    batch = memory_fit.largest_batch(trainer)
    need = memory_fit.Fit(trainer, batch, 1.0, NOTHING, "")._encoding_gib(trainer.config.quantisation)
    with pytest.raises(SettingsError, match="does not fit"):
        chosen(trainer, need * 0.1)
    memory, _ = chosen(trainer, 100.0)
    assert not memory.gradient_checkpointing


def test_a_run_goes_by_what_was_chosen(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a card: the settings that everything reads later are the chosen ones."""
    trainer = prepared("--vram_gb=auto")
    need = memory_fit.rehearse(trainer, Row(), memory_fit.largest_batch(trainer))
    monkeypatch.setattr(memory_fit.Fit, "_encoding_gib", lambda *arguments: 0.0)
    # A tiny model's need is far below what CUDA takes for itself.
    limit = memory_fit.allowance_for("auto").with_allowance(need.bytes_with(0) - 1)
    monkeypatch.setattr(memory_fit, "free_gib", lambda device: limit)
    trainer.device = torch.device("cuda")
    trainer.fit_memory()
    assert trainer.config.memory.gradient_checkpointing or trainer.config.memory.blocks_to_swap
    assert trainer.config.memory.vram_gb == "auto"


@pytest.mark.parametrize("given", ["0", "-3", "much", "nan"])
def test_a_size_that_is_none(prepared: Prepared, given: str) -> None:
    with pytest.raises(SettingsError, match=r"--vram_gb: .*GiB, such as 12, or auto"):
        prepared(f"--vram_gb={given}")


class Seen(Exception):
    """Ends a run where a test has seen enough."""


def test_trackers_get_the_flags_that_were_chosen(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(trainer: Any, asked: Any) -> tuple[Any, Any]:
        memory = dataclasses.replace(trainer.config.memory, gradient_checkpointing=True, blocks_to_swap=3)
        return memory, trainer.config.quantisation

    def stop(trainer: Any) -> None:
        raise Seen

    monkeypatch.setattr(memory_fit, "fitted_settings", fitted)
    monkeypatch.setattr(LuminaNetworkTrainer, "cache_latents", stop)
    flags = job.train_flags(tmp_path / "out", "--vram_gb=8", "--log_config", f"--logging_dir={tmp_path / 'logs'}")
    fresh_accelerate()
    config = parse_arguments(flags)
    assert config is not None
    with pytest.raises(Seen):
        LuminaNetworkTrainer(config).train()
    (stored,) = (tmp_path / "logs").rglob("hparams.yml")
    text = stored.read_text(encoding="utf-8")
    assert "gradient_checkpointing: true" in text
    assert "blocks_to_swap: 3" in text
    assert "vram_gb: 8.0" in text
