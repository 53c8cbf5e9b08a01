"""Gemma2's layers streamed on a stand-in for a device: the same features, and nothing is left when captions are cached."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import Job, make_job
from models_helpers import tiny_models
from trainer_helpers import fresh_accelerate, made_trainer
from transport_helpers import LateTransport

import lumina_train_network
from library.lumina.gemma2 import LARGE_MATRICES, Gemma2Encoder, build_gemma2
from library.lumina.weighted_captions import WeightedTokenizer
from library.memory import prepare
from library.memory.block_stream import NUM_SLOTS
from library.memory.quantised import quantise_block
from library.memory.transport import Lane

CPU = torch.device("cpu")
BATCHES = [
    ["a red disc on a blue background", "", "ring"],
    ["a (yellow:1.4) cross, drawn in the centre of a dark picture"],
    ["disc"] * 4,
]
NUM_LAYERS = tiny_models().gemma2_config.num_layers_used
CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]


class Device:
    """What programs take for a device with memory of its own."""

    def __init__(self) -> None:
        self.transports: list[LateTransport] = []
        self.buffers: list[weakref.ref[torch.Tensor]] = []

    def transport(self, device: torch.device) -> LateTransport:
        made = LateTransport()
        take = made._buffer

        def noted(num_bytes: int, is_host: bool) -> torch.Tensor:
            buffer = take(num_bytes, is_host)
            self.buffers.append(weakref.ref(buffer))
            return buffer

        made._buffer = noted  # type: ignore[method-assign]
        self.transports.append(made)
        return made

    @property
    def num_buffers(self) -> int:
        """How many buffers, of the host and of the device, are in use."""
        gc.collect()
        return sum(buffer() is not None for buffer in self.buffers)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device()
    monkeypatch.setattr(prepare, "CudaTransport", made.transport)
    monkeypatch.setattr(prepare, "can_stream", lambda device: True)
    yield made
    for transport in made.transports:
        transport.finish()
    fresh_accelerate()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def made_encoder(kind: str) -> Gemma2Encoder:
    models = tiny_models()
    dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float32
    tensors = {name: models.gemma2[name].to(dtype).clone() for name in models.gemma2_config.tensor_shapes()}
    encoder = Gemma2Encoder(
        build_gemma2(models.gemma2_config, tensors), WeightedTokenizer(models.tokenizer, 40), "Draw well."
    )
    if kind.endswith("fp8"):
        for layer in encoder.blocks:
            quantise_block(layer, LARGE_MATRICES, "fp8", CPU)
    return encoder


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp32 fp8", "bf16 fp8"])
def test_features_are_the_same_bits(device: Device, kind: str) -> None:
    encoder, plain = made_encoder(kind), made_encoder(kind)
    stream = prepare.stream_weights(encoder.blocks, CPU, "layers")
    (transport,) = device.transports
    # All that a layer holds is streamed: nothing is left outside of the host's buffers.
    streamed = {buffer().untyped_storage().data_ptr() for buffer in device.buffers}  # type: ignore[union-attr]
    for layer in encoder.blocks:
        assert {tensor.untyped_storage().data_ptr() for tensor in layer.state_dict().values()} <= streamed
    with transport.watched(), torch.no_grad():
        found = [feature.clone() for batch in BATCHES for feature in encoder.encode(batch)]
    with torch.no_grad():
        expected = [feature for batch in BATCHES for feature in plain.encode(batch)]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all()
        assert torch.equal(ours, theirs)
    # Each pass brings every layer but those that the pass before has brought: the first one, and with three
    # layers in a ring of two no other.
    assert transport.num_copies[Lane.WEIGHTS] == len(BATCHES) * NUM_LAYERS + 1
    assert stream.num_ring_bytes * NUM_LAYERS == stream.num_host_bytes * NUM_SLOTS
    assert device.num_buffers == NUM_LAYERS + NUM_SLOTS
    stream.free()
    assert device.num_buffers == NUM_LAYERS
    del encoder, layer, stream
    assert device.num_buffers == 0


def cached_features(trainer: Any) -> list[torch.Tensor]:
    batch = trainer.data.load(trainer.data.plan_epoch(1, 1).batch(0).draws)
    prompts = [feature for pair in trainer._prompt_features.values() for feature in pair]
    return [*batch.text, *prompts]


@pytest.mark.parametrize("more", [[], ["--fp8_base"]], ids=["fp32", "fp8"])
def test_caching_streams_and_leaves_nothing(job: Job, tmp_path: Path, device: Device, more: list[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --n blue\na ring\n", encoding="utf-8")
    flags = job.train_flags(
        tmp_path, *CACHED, *more, f"--sample_prompts={prompts}", "--sample_at_first", "--text_encoder_batch_size=2"
    )
    expected = cached_features(made_trainer(flags, last="cache_text"))
    assert not device.transports
    trainer = made_trainer([*flags, "--blocks_to_swap=1"], last="cache_text")
    (transport,) = device.transports
    assert transport.num_copies[Lane.WEIGHTS] > 3 * NUM_LAYERS  # several batches of captions, and the prompts
    found = cached_features(trainer)
    assert len(found) == len(expected) == 1 + 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert trainer.text_encoder is None
    assert trainer.text_stream is None
    assert device.num_buffers == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("num_blocks", "place"), [(2, "cpu"), (0, "meta")])
def test_streamed_layers_are_quantised_on_the_device_and_wait_in_host_memory(
    job: Job,
    tmp_path: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    num_blocks: int,
    place: str,
    precision: str,
) -> None:
    fresh_accelerate()
    readings: list[Any] = []

    def noted(trainer: Any, dtype: torch.dtype, reading: Any) -> None:
        readings.append(reading)

    monkeypatch.setattr(lumina_train_network.LuminaNetworkTrainer, "load_text_encoder", noted)
    more = ["--fp8_base", f"--mixed_precision={precision}", "--network_train_unet_only"]
    trainer = made_trainer(job.train_flags(tmp_path, *more, f"--blocks_to_swap={num_blocks}"), last="start")
    trainer.device = torch.device("meta")  # stands for another device than the CPU
    trainer._read_text_encoder()
    (reading,) = readings
    assert reading.finish.keywords == {
        "kind": "fp8",
        "device": torch.device("meta"),
        "place": torch.device(place),
        "in_halves": precision == "fp16",
    }


def test_captions_of_each_step(job: Job, tmp_path: Path, device: Device) -> None:
    def losses(*more: str) -> torch.Tensor:
        trainer = made_trainer(job.train_flags(tmp_path, "--network_train_unet_only", "--train_batch_size=2", *more))
        plan = trainer.data.plan_epoch(1, 1)
        return torch.cat([trainer.losses_of(trainer.data.load(plan.batch(step).draws)).values for step in range(3)])

    expected = losses()
    assert not device.transports
    assert torch.equal(losses("--blocks_to_swap=2"), expected)
    of_gemma2, _ = device.transports
    assert of_gemma2.num_copies[Lane.WEIGHTS] == 3 * NUM_LAYERS + 1


@pytest.mark.parametrize(
    ("more", "num_streams"),
    [
        (["--blocks_to_swap=2"], 1),  # Gemma2 is trained, so it stays on the device
        (["--blocks_to_swap=0", "--network_train_unet_only"], 0),
    ],
    ids=["trained", "0 blocks"],
)
def test_when_nothing_is_streamed(job: Job, tmp_path: Path, device: Device, more: list[str], num_streams: int) -> None:
    trainer = made_trainer(job.train_flags(tmp_path, *more))
    assert trainer.ready_text_encoder() is trainer.text_encoder
    assert trainer.text_stream is None
    assert len(device.transports) == num_streams
