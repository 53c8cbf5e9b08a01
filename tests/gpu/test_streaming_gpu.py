"""Block streaming and activation offload on CUDA: bit for bit the same, less memory, and the host never waits."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from e2e_helpers import ROOT, Job, distance, make_pictures, python
from lora_helpers import fill
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.lumina.next_dit import NextDiT, NextDiTConfig
from library.memory import prepare
from library.memory.settings import MemorySettings
from library.memory.transport import CudaTransport, Lane, Pairs
from networks import lora_lumina

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

CONFIG = NextDiTConfig(
    dim=768, num_layers=8, num_noise_refiners=1, num_context_refiners=1, num_heads=8, num_kv_heads=4, ffn_dim=3072,
    time_dim=256, cap_dim=256,
)  # fmt: skip
BLOCK_BYTES = 18 * 2**20  # of weights in bfloat16, a little less than it is


class LateTransport(CudaTransport):
    """Every copy is late, and its destination holds NaNs until then: a missing wait shows in the numbers."""

    def copy(self, lane: Lane, pairs: Pairs, after: Iterable[torch.cuda.Event]) -> torch.cuda.Event:
        stream = self._streams[lane]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            for destination, _ in pairs:
                if destination.is_cuda:
                    destination.fill_(0xFF)
            torch.cuda._sleep(2_000_000)  # about a millisecond
        return super().copy(lane, pairs, ())


class Run:
    """A model with a LoRA on the GPU."""

    def __init__(self, settings: MemorySettings) -> None:
        device = torch.device("cuda")
        torch.manual_seed(0)
        self.model = NextDiT(CONFIG).bfloat16().requires_grad_(False)
        streamed = prepare.streamed_blocks(list(self.model.layers), settings.blocks_to_swap, device)
        prepare.place(self.model, device, besides=streamed)
        self.network = lora_lumina.create_network(1.0, 8, 8.0, None, [], self.model)
        self.network.apply_to([], self.model, False, True)
        fill(self.network, size=0.02)
        self.network.to(device).train()
        blocks = [*self.model.noise_refiner, *self.model.context_refiner, *self.model.layers]
        self.stream = prepare.prepare_blocks(
            blocks, settings, device, streamed=streamed, resident=self.network.parameters()
        )
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randn(2, 16, 48, 48, generator=generator), torch.rand(2, generator=generator)]
        self.inputs = [value.to(device) for value in [*inputs, torch.randn(2, 64, 256, generator=generator)]]

    def step(self) -> dict[str, Tensor]:
        """Returns what a pass without gradients gives, the loss and the gradients of two added passes."""
        latents, time, features = self.inputs
        # The one attention kernel whose backward pass is the same every time.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                found = {"preview": self.model(latents, time, features)}
            for factor in (1.0, 0.5):
                loss = self.model(latents * factor, time, features).float().square().mean()
                loss.backward()
        found["loss"] = loss.detach()
        for name, parameter in self.network.named_parameters():
            found[name] = parameter.grad
            parameter.grad = None
        return found


OPTIONS: dict[str, dict[str, Any]] = {
    "streaming 8": {"blocks_to_swap": 8},
    "streaming 3": {"blocks_to_swap": 3},
    "checkpointing, streaming 8": {"blocks_to_swap": 8, "gradient_checkpointing": True},
    "offload": {"cpu_offload_checkpointing": True},
    "checkpointing, offload": {"cpu_offload_checkpointing": True, "gradient_checkpointing": True},
    "all": {"blocks_to_swap": 8, "cpu_offload_checkpointing": True, "gradient_checkpointing": True},
    "streaming, offload": {"blocks_to_swap": 8, "cpu_offload_checkpointing": True},
    "selective, streaming 8, offload": {
        "blocks_to_swap": 8,
        "cpu_offload_checkpointing": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_level": "selective",
    },
}


@pytest.fixture
def host_never_waits() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("host_never_waits")
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_bits_and_no_wait(options: dict[str, Any], late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Run(MemorySettings(**{name: options[name] for name in options if name.startswith("gradient_")}))
    expected = plain.step()
    for name, value in plain.step().items():
        assert torch.equal(value, expected[name]), f"{name} is not the same twice, so nothing can be compared"
    if late:
        monkeypatch.setattr(prepare, "CudaTransport", LateTransport)
    run = Run(MemorySettings(**options))
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        found = run.step()
        torch.cuda.set_sync_debug_mode("default")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value.isfinite().all()
            assert torch.equal(found[name], value), name


def peak_bytes(settings: MemorySettings) -> int:
    """Returns the most device memory that a second step holds, weights included."""
    gc.collect()  # wrapped blocks refer to themselves
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run = Run(settings)
    run.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_streaming_needs_less_memory() -> None:
    plain = peak_bytes(MemorySettings(gradient_checkpointing=True))
    half = peak_bytes(MemorySettings(gradient_checkpointing=True, blocks_to_swap=5))
    all_of_them = peak_bytes(MemorySettings(gradient_checkpointing=True, blocks_to_swap=8))
    # Two blocks have room in the ring. A block's worth is left for what allocations are rounded up to.
    assert half < plain - 2 * BLOCK_BYTES
    assert all_of_them < plain - 5 * BLOCK_BYTES


def test_offload_needs_less_memory() -> None:
    for checkpointing, factor in ((False, 0.7), (True, 1.0)):
        plain = peak_bytes(MemorySettings(gradient_checkpointing=checkpointing))
        offloaded = peak_bytes(MemorySettings(gradient_checkpointing=checkpointing, cpu_offload_checkpointing=True))
        # Without checkpointing, ten blocks' activations are most of the memory, and two to four blocks' stay.
        assert offloaded < factor * plain


def test_the_ring_is_given_back() -> None:
    run = Run(MemorySettings(blocks_to_swap=8))
    expected = run.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert run.stream is not None
    run.stream.free()
    assert torch.cuda.memory_allocated() <= before - 2 * BLOCK_BYTES
    found = run.step()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_host_memory_is_pinned() -> None:
    transport = CudaTransport(torch.device("cuda"))
    small, large = transport.host_buffer(100), transport.host_buffer(3 * 2**20 + 1)
    assert (small.numel(), large.numel()) == (100, 3 * 2**20 + 1)
    assert small.is_pinned()
    assert large.is_pinned()
    data = torch.arange(100, dtype=torch.uint8)
    small.copy_(data)
    on_device = transport.device_buffer(100)
    token = transport.copy(Lane.WEIGHTS, [(on_device, small)], after=[transport.mark()])
    transport.wait(token)
    assert torch.equal(on_device.cpu(), data)


@pytest.mark.parametrize("lane", [Lane.WEIGHTS, Lane.OUT])
def test_copies_keep_neither_the_host_nor_the_computation_waiting(lane: Lane) -> None:
    """The driver copies memory that is not pinned by itself, and the host waits for it."""
    num_bytes = 64 * 2**20
    transport = CudaTransport(torch.device("cuda"))
    host, device = transport.host_buffer(num_bytes), transport.device_buffer(num_bytes)
    host.fill_(3)
    device.fill_(5)
    pair = (device, host) if lane is Lane.WEIGHTS else (host, device)
    torch.cuda.synchronize()
    computation = torch.cuda.current_stream()
    torch.cuda._sleep(2 * 10**9)  # about a second
    token = transport.copy(lane, [pair], after=[transport.mark()])
    assert not token.query()  # the order was given, and what it comes after goes on
    assert not computation.query()
    torch.cuda.synchronize()
    assert bool((pair[0] == (3 if lane is Lane.WEIGHTS else 5)).all())
    # Nothing was said to come before or after: the copy ends while the computation goes on.
    torch.cuda._sleep(2 * 10**9)
    transport.copy(lane, [pair], after=[]).synchronize()
    assert not computation.query()
    torch.cuda.synchronize()


def test_weights_elsewhere_are_an_error_while_they_are_not_present() -> None:
    run = Run(MemorySettings(blocks_to_swap=8))
    run.step()
    weight = run.model.layers[5].attention.qkv.weight
    assert weight.device.type == "cpu"
    with pytest.raises(RuntimeError, match="device"):
        torch.nn.functional.linear(torch.ones(1, CONFIG.dim, device="cuda", dtype=torch.bfloat16), weight)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    pytest.importorskip("diffusers", reason="the programs need it for the autoencoder")
    folder = tmp_path_factory.mktemp("job")
    make_pictures(folder / "pictures")
    return Job(folder, ROOT / "configs" / "quickstart" / "models", folder / "pictures")  # they have 4 layers


def test_the_training_program(job: Job, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 3 --d 0\n", encoding="utf-8")
    flags = [f"--sample_prompts={prompts}", "--sample_every_n_epochs=1", "--validation_split=0.3", "--cache_latents"]
    for name, more in {
        "plain": [],
        "streamed": ["--blocks_to_swap=4", "--cpu_offload_checkpointing", "--gradient_checkpointing"],
    }.items():
        done = python("lumina_train_network.py", *job.train_flags(tmp_path / name, *flags, *more))
        assert done.returncode == 0, done.stderr
        assert ("The weights of 4 blocks are streamed" in done.stderr) == bool(more)
    # Attention's backward kernel adds up in any order, and Adam's first steps go by signs.
    assert distance(tmp_path / "plain" / "my.safetensors", tmp_path / "streamed" / "my.safetensors") < 0.1


def test_the_inference_program(job: Job, tmp_path: Path) -> None:
    pictures = []
    streaming = ["--blocks_to_swap=4"]
    for name, more in {"plain": [], "streamed": streaming, "offloaded": [*streaming, "--offload"]}.items():
        done = python("lumina_minimal_inference.py", *job.inference_flags, f"--output_dir={tmp_path / name}", *more)
        assert done.returncode == 0, done.stderr
        assert ("The weights of 3 layers of Gemma2 are streamed" in done.stderr) == bool(more)
        (path,) = (tmp_path / name).iterdir()
        pictures.append(numpy.asarray(Image.open(path)))
    assert numpy.array_equal(pictures[0], pictures[1])
    assert numpy.array_equal(pictures[0], pictures[2])
