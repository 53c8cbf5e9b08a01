"""Whole runs of the trainer with streaming and offload on a stand-in for a device: the same files as without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from e2e_helpers import ROOT, Job, make_pictures
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from trainer_helpers import fresh_accelerate
from transport_helpers import LateTransport

import lumina_train_network
from library.memory import activation_offload, prepare
from library.memory.transport import Lane


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    make_pictures(folder / "pictures")
    # The quick start's models have 4 layers; with 2 nothing would ever leave the ring.
    return Job(folder, ROOT / "configs" / "quickstart" / "models", folder / "pictures")


@pytest.fixture
def transports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LateTransport]]:
    """Makes the CPU look like a device with memory of its own; the stand-ins that were asked for."""
    made: list[LateTransport] = []

    def make(device: torch.device) -> LateTransport:
        made.append(LateTransport())
        return made[-1]

    monkeypatch.setattr(prepare, "CudaTransport", make)
    monkeypatch.setattr(prepare, "can_stream", lambda device: True)
    monkeypatch.setattr(activation_offload.ActivationOffload.__init__, "__defaults__", ((), 1024, 4096))
    yield made
    for transport in made:
        transport.finish()


def train(job: Job, output: Path, *more: str) -> Path:
    fresh_accelerate()
    lumina_train_network.main(job.train_flags(output, "--network_train_unet_only", *more))
    return output


def same_tensors(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_with_validation_and_previews(job: Job, tmp_path: Path, transports: list[LateTransport]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 2 --d 0\n", encoding="utf-8")
    flags = [
        f"--sample_prompts={prompts}",
        "--sample_every_n_epochs=1",
        "--sample_at_first",
        "--validation_split=0.3",
        "--validate_every_n_steps=2",
        "--gradient_accumulation_steps=2",
        "--network_dropout=0.2",
        "--cache_latents",
        "--gradient_checkpointing",
    ]
    expected = train(job, tmp_path / "plain", *flags)
    assert not transports
    found = train(job, tmp_path / "streamed", *flags, "--blocks_to_swap=3", "--cpu_offload_checkpointing")
    of_gemma2, of_transformer = transports
    assert of_gemma2.num_copies[Lane.WEIGHTS] > 10
    assert of_gemma2.num_copies[Lane.BACK] == 0
    assert of_transformer.num_copies[Lane.WEIGHTS] > 10
    assert of_transformer.num_copies[Lane.BACK] > 10
    assert same_tensors(found / "my.safetensors", expected / "my.safetensors")
    pictures = [sorted((folder / "sample").glob("*.png")) for folder in (found, expected)]
    assert len(pictures[0]) == 3
    for ours, theirs in zip(*pictures, strict=True):
        assert numpy.array_equal(numpy.asarray(Image.open(ours)), numpy.asarray(Image.open(theirs)))


def test_streamed_blocks_never_lie_on_the_device(
    job: Job, tmp_path: Path, transports: list[LateTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[tuple[nn.Module, list[nn.Module]]] = []

    def note(model: nn.Module, device: torch.device, besides: list[nn.Module] = ()) -> nn.Module:  # type: ignore[assignment]
        placed.append((model, list(besides)))
        return model

    monkeypatch.setattr(prepare, "place", note)
    train(job, tmp_path / "out", "--blocks_to_swap=3", "--max_train_epochs=1")
    ((model, besides),) = placed
    assert besides == [model.layers[index * len(model.layers) // 3] for index in range(3)]


def test_place_moves_all_but_some_modules() -> None:
    # To the meta device and not from it: there is no other second device on every machine.
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2))
    assert prepare.place(model, torch.device("meta"), besides=[model[1][0]]) is model
    devices = {name: tensor.device.type for name, tensor in model.state_dict().items()}
    assert {name for name, device in devices.items() if device == "cpu"} == {"1.0.weight", "1.0.bias"}
    assert "meta" in devices.values()


@pytest.mark.parametrize(
    ("count", "chosen"), [(0, []), (1, [0]), (2, [0, 3]), (4, [0, 1, 3, 5]), (7, [0, 1, 2, 3, 4, 5, 6])]
)
def test_streamed_blocks_are_spread(count: int, chosen: list[int]) -> None:
    assert prepare.spread(range(7), count) == chosen
