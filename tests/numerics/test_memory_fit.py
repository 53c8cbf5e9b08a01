"""What ``--vram_gb`` expects of a step is what the step needs, and the flags it takes are the fastest that fit."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from e2e_helpers import Job, make_job
from torch import nn
from trainer_helpers import fresh_accelerate, made_trainer

from library.errors import SettingsError
from library.lumina.strips import STRIP_BYTES
from library.memory import half_products
from library.memory.attention_masks import AttentionFn
from library.memory.block_stream import streamed_bytes
from library.memory.fit import GIB, HOST_COPY_BYTES, Allowance, Need, Row
from library.memory.half_attention import in_halves
from library.memory.live_bytes import LiveBytes, bytes_of
from library.memory.rehearsal import RehearsedAttention
from library.training import memory_fit, step_rehearsal
from library.training.arguments import parse_arguments
from library.training.hooks import Reading
from lumina_train_network import LuminaNetworkTrainer

CPU = torch.device("cpu")
NOTHING = Allowance(0.0, 0.0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


class PlainNetwork(nn.Module):
    """A network as another program would make it, beside the first block's feed-forward layer."""

    def __init__(
        self, multiplier: float, rank: int, alpha: float, vae: None, encoders: Any, model: Any, **_: Any
    ) -> None:
        super().__init__()
        linear = model.layers[0].feed_forward.w2
        self._org = (linear,)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def apply_to(self, encoders: Any, model: nn.Module, *parts: bool) -> None:
        (linear,) = self._org
        forward = linear.forward
        linear.forward = lambda x: forward(x) + self.up(F.dropout(self.down(x), 0.5))


create_network = PlainNetwork  # for --network_module with this file's name
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
    "precision",
    [[], ["--mixed_precision=bf16"], ["--fp8_base_unet"], ["--mixed_precision=fp16"]],
    ids=["fp32", "bf16", "fp8", "fp16"],
)
def test_a_real_step_needs_what_was_expected(
    prepared: Prepared, level: str, precision: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU; a CPU multiplies in float32, in more memory.
    monkeypatch.setattr(half_products, "_multiplied", lambda halves, matrix: halves @ matrix)
    flags = [] if level == "none" else ["--gradient_checkpointing", f"--gradient_checkpointing_level={level}"]
    trainer = prepared(*flags, *precision, last="cache_text")
    batch = memory_fit.largest_batch(trainer)
    need = step_rehearsal.rehearse(trainer, Row(trainer.config.quantisation.transformer, level), batch)

    counter = LiveBytes(CPU)
    attention: AttentionFn = RehearsedAttention(counter, expands=True)
    attention = in_halves(attention) if trainer.config.memory.in_halves else attention
    trainer.attention = dataclasses.replace(trainer.attention, function=attention)
    trainer.load_models()
    assert need.weights == bytes_of((*trainer.dit.parameters(), *trainer.dit.buffers()), CPU)
    text = tuple(torch.zeros(feature.shape, dtype=feature.dtype) for feature in batch.text)
    real = dataclasses.replace(batch, latents=torch.zeros(batch.latents.shape).bfloat16(), text=text)
    with counter:
        trainer.build_network()
        optimizer = step_rehearsal.optimizer_with_states(trainer.network)
        counter.reset_peak()
        step_rehearsal.one_step(trainer, real, optimizer, counter)
    # What is already on the CPU is not copied to the device: noise and target in float32, that is four times the latents.
    assert 0 <= need.step - counter.peak <= 5 * real.latents.nbytes


def needs(trainer: Any, batch: Any, kind: Any = None) -> dict[tuple[str, bool], Need]:
    return {
        (level, offload): step_rehearsal.rehearse(trainer, Row(kind, level, offload), batch)
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
    assert step_rehearsal.rehearse(trainer, Row(), one).step < plain.step


def test_trained_parts_are_counted(prepared: Prepared) -> None:
    small, large = (prepared(f"--network_dim={rank}") for rank in (4, 8))
    need, larger = (step_rehearsal.rehearse(one, Row(), memory_fit.largest_batch(one)) for one in (small, large))
    assert larger.trained > need.trained
    averaged = prepared("--network_dim=8", "--ema_decay=0.99")
    with_average = step_rehearsal.rehearse(averaged, Row(), memory_fit.largest_batch(averaged))
    assert with_average.trained > larger.trained
    accumulating = prepared("--network_dim=8", "--gradient_accumulation_steps=2")
    gradients = step_rehearsal.rehearse(accumulating, Row(), memory_fit.largest_batch(accumulating)).trained
    assert gradients == with_average.trained


@pytest.mark.parametrize(
    ("name", "extra"),
    [("AdamW", 0), ("prodigy", 2), ("prodigyopt.Prodigy", 2), ("DAdaptation", 1), ("DAdaptAdanIP", 3), ("Lion", 0)],
)
def test_optimizers_that_keep_more(prepared: Prepared, name: str, extra: int) -> None:
    trainer = prepared()
    optimizer = torch.optim.AdamW([nn.Parameter(torch.empty(1024, device=step_rehearsal.META))])
    settings = dataclasses.replace(trainer.config.optimizer, optimizer_type=name)
    trainer.config = dataclasses.replace(trainer.config, optimizer=settings)
    assert step_rehearsal.besides(trainer, optimizer) == extra * 4096


def test_gemma2_and_the_autoencoder_count_where_they_are_not_let_go(prepared: Prepared) -> None:
    cached = prepared()
    batch = memory_fit.largest_batch(cached)
    need = step_rehearsal.rehearse(cached, Row(), batch)
    trains_text = prepared("--cache_text_encoder_outputs=false")
    with_text = step_rehearsal.rehearse(trains_text, Row(), memory_fit.largest_batch(trains_text))
    gemma2 = trains_text.rehearse_text_encoder(torch.float32, step_rehearsal.reading_of(None, False)).model
    assert with_text.weights - need.weights == bytes_of(gemma2.parameters(), step_rehearsal.META) + bytes_of(
        gemma2.buffers(), step_rehearsal.META
    )
    assert with_text.trained > need.trained
    assert with_text.step > need.step
    uncached = prepared("--cache_latents=false")
    with_ae = step_rehearsal.rehearse(uncached, Row(), memory_fit.largest_batch(uncached))
    assert with_ae.weights - need.weights == 4 * uncached.autoencoder_numbers()


def test_gemma2_in_fp16_counts_as_it_is_read(prepared: Prepared) -> None:
    whole, halves = (prepared("--cache_text_encoder_outputs=false", *more) for more in ([], ["--mixed_precision=fp16"]))
    need = step_rehearsal.rehearse(halves, Row(), memory_fit.largest_batch(halves))
    halves.load_models()
    gemma2 = halves.text_encoder.model
    models = (halves.dit, *(part for part in gemma2.children() if part is not gemma2.embed_tokens))  # which stays
    assert need.weights == sum(bytes_of((*model.parameters(), *model.buffers()), CPU) for model in models)
    assert step_rehearsal.encoder_bytes(halves, None)[False] < step_rehearsal.encoder_bytes(whole, None)[False]


def test_the_largest_batch(prepared: Prepared) -> None:
    trainer = prepared()
    batch = memory_fit.largest_batch(trainer)
    sizes = {item.bucket_px for item in trainer.data.items}
    width, height = batch.draws[0].item.bucket_px
    assert (width, height) in sizes
    plan = trainer.data.plan_epoch(1, 1)
    batches = [plan.batch(number).draws for number in range(len(plan.batches))]
    largest = max(len(draws) * math.prod(draws[0].item.bucket_px) for draws in batches)
    assert len(batch.draws) * width * height == largest > math.prod(batches[0][0].item.bucket_px)
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
    need = memory_fit.Fit(trainer, batch, 1.0, NOTHING, "")._encoding_gib(None, streams=True)
    pictures = 4 * trainer.autoencoder_numbers() + step_rehearsal.autoencoder_bytes(trainer, batch)
    captions = step_rehearsal.encoder_bytes(trainer, None)[True]
    assert need * GIB == max(pictures, captions) == pictures
    step = step_rehearsal.rehearse(trainer, Row("fp8", "full", True), batch)
    assert step.bytes_with(0) / GIB < need * 0.9  # training alone would fit
    with pytest.raises(SettingsError, match="does not fit"):
        chosen(trainer, need * 0.9)
    memory, _ = chosen(trainer, 100.0)
    assert not memory.gradient_checkpointing


def test_captions_are_encoded_with_streamed_layers_where_gemma2_does_not_fit(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card too small for Gemma2 as a whole streams it, before any weight is quantised."""
    monkeypatch.setattr(memory_fit, "autoencoder_bytes", lambda *arguments: 0)
    trainer = prepared()
    deeper = dataclasses.replace(trainer.files.dit.config, num_layers=4)  # streaming two saves nothing
    trainer.files = dataclasses.replace(trainer.files, dit=dataclasses.replace(trainer.files.dit, config=deeper))
    needs_of = step_rehearsal.encoder_bytes(trainer, None)
    layers = [streamed_bytes(layer) for layer in trainer.rehearse_text_encoder(torch.float32, Reading()).blocks]
    assert needs_of[False] - needs_of[True] == sum(layers) - 2 * max(layers) > 0
    limit = (needs_of[False] - 1) / GIB
    step = needs(trainer, memory_fit.largest_batch(trainer))["full", True]
    assert max(needs_of[True], step.bytes_with(4)) / GIB < limit  # the captions alone decide what fits
    memory, quantisation = chosen(trainer, limit)
    assert memory.blocks_to_swap
    assert quantisation.transformer is None
    assert quantisation.text_encoder is None
    _, quantisation = chosen(trainer, needs_of[False] / GIB)
    assert quantisation.transformer is None


def test_gemma2_is_streamed_in_each_step_where_it_is_not_trained(prepared: Prepared) -> None:
    uncached = prepared("--cache_text_encoder_outputs=false", "--network_train_unet_only")
    need = step_rehearsal.rehearse(uncached, Row(), memory_fit.largest_batch(uncached))
    layers = need.text_layers
    assert len(layers) == len(uncached.rehearse_text_encoder(torch.float32, Reading()).blocks)
    alone = dataclasses.replace(need, text_layers=())
    assert alone.bytes_with(0) == need.bytes_with(0)
    assert alone.bytes_with(3) - need.bytes_with(3) == sum(layers) - 2 * max(layers) > 0
    assert need.seconds_with(3) - alone.seconds_with(3) == pytest.approx(sum(layers) / HOST_COPY_BYTES)
    trained = prepared("--cache_text_encoder_outputs=false")
    assert step_rehearsal.rehearse(trained, Row(), memory_fit.largest_batch(trained)).text_layers == ()


def test_large_pictures_in_tiles(prepared: Prepared) -> None:
    trainer = prepared("--vae_tiling")
    batch = memory_fit.largest_batch(trainer)
    small = step_rehearsal.autoencoder_bytes(trainer, batch)
    placement = dataclasses.replace(batch.draws[0].item.placement, bucket_px=(2048, 2048))
    item = dataclasses.replace(batch.draws[0].item, placement=placement)
    large = dataclasses.replace(batch, draws=(dataclasses.replace(batch.draws[0], item=item),))
    tiled, whole = (step_rehearsal.autoencoder_bytes(one, large) for one in (trainer, prepared()))
    strips = 2 * STRIP_BYTES  # the same whatever the size
    assert small < tiled - strips == (whole - strips) // 4


@pytest.mark.parametrize("level", ["none", "selective"])
def test_a_network_module_of_another_kind(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """It draws from torch's generator; the real one is to begin as it would without --vram_gb."""
    trainer = prepared(f"--network_module={__name__}")
    assert not trainer.networks.has_companion
    state = torch.get_rng_state()
    need = step_rehearsal.rehearse(trainer, Row(checkpointing=level), memory_fit.largest_batch(trainer))
    assert need.trained > 0
    assert torch.equal(torch.get_rng_state(), state)
    offered = {row.checkpointing for row in memory_fit.Fit(trainer, [], 1.0, NOTHING, "")._open_rows()}
    assert offered == {"none", "full"}  # it may write over what the selective level keeps


def test_a_network_module_that_reads_weights_is_no_defect(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(PlainNetwork):
        def apply_to(self, encoders: Any, model: nn.Module, *parts: bool) -> None:
            next(model.parameters()).sum().item()

    trainer = prepared(f"--network_module={__name__}")
    monkeypatch.setattr(sys.modules[__name__], "create_network", Reads)
    with pytest.raises(SettingsError, match=r"--vram_gb: the network of --network_module .* leave --vram_gb out"):
        step_rehearsal.rehearse(trainer, Row(), memory_fit.largest_batch(trainer))


def test_a_run_goes_by_what_was_chosen(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a card: the settings that everything reads later are the chosen ones."""
    trainer = prepared("--vram_gb=auto")
    need = step_rehearsal.rehearse(trainer, Row(), memory_fit.largest_batch(trainer))
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
