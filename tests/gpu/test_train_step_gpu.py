"""The trainer's step on CUDA: losses, gradients and their norm without waiting for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import ROOT, Job, make_pictures
from trainer_helpers import fill_network, made_trainer

from library.data.items import Batch
from library.training.processes import Processes
from library.training.step import TrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

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
CACHED = ["--mixed_precision=bf16", "--cache_latents", "--cache_text_encoder_outputs"]
DROPOUTS = ["--network_dropout=0.2", "--network_args", "rank_dropout=0.2", "module_dropout=0.2"]
NEEDS_FP8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU that multiplies in fp8",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    pytest.importorskip("diffusers", reason="the programs need it for the autoencoder")
    folder = tmp_path_factory.mktemp("job")
    make_pictures(folder / "pictures")
    return Job(folder, ROOT / "configs" / "quickstart" / "models", folder / "pictures")  # they have 4 layers


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where anything inside waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trainer_of(job: Job, folder: Path, flags: list[str]) -> Any:
    (folder / "data.toml").write_text(DATASET.format(pictures=job.pictures), encoding="utf-8")
    given = [flag for flag in job.train_flags(folder / "out", *CACHED, *flags) if "--train_data_dir" not in flag]
    trainer = made_trainer([*given, f"--dataset_config={folder / 'data.toml'}"])
    assert trainer.device.type == "cuda"
    fill_network(trainer.network)
    return trainer


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--gradient_checkpointing", *DROPOUTS],
        ["--gradient_checkpointing", "--gradient_checkpointing_level=selective"],
        ["--fp8_base", "--gradient_checkpointing"],
        pytest.param(["--fp8_base", "--fp8_fast"], marks=NEEDS_FP8),
        ["--mixed_precision=fp16", "--gradient_checkpointing"],
        ["--mixed_precision=fp16", "--fp8_base", "--blocks_to_swap=4"],
        ["--blocks_to_swap=4", "--gradient_checkpointing", "--cpu_offload_checkpointing"],
        ["--ip_noise_gamma=0.1", "--ip_noise_gamma_random_strength", "--attn_mode=sdpa"],
        ["--model_prediction_type=sigma_scaled", "--loss_type=huber", "--huber_schedule=snr"],
    ],
    ids=[
        "plain",
        "checkpointing, dropouts",
        "selective",
        "fp8",
        "fp8_fast",
        "fp16",
        "fp16, fp8, streaming",
        "streaming, offload",
        "perturbed",
        "huber",
    ],
)
@pytest.mark.parametrize("preserves", [False, True], ids=["", "preserved"])
def test_losses_and_gradients_wait_for_nothing(job: Job, tmp_path: Path, flags: list[str], preserves: bool) -> None:
    trainer = trainer_of(job, tmp_path, flags)
    first, second = (trainer.data.load(trainer.data.plan_epoch(epoch, 1).batch(0).draws) for epoch in (1, 2))
    assert len({len(text) for text in first.text}) > 1  # captions of different lengths
    if preserves:
        first, second = (_preserving(batch) for batch in (first, second))
    height, width = first.latents.shape[-2:]
    first.masks = second.masks = torch.rand(len(first.draws), height, width)

    def compute(batch: Batch) -> torch.Tensor:
        losses, _ = trainer.losses_of(batch)
        losses.sum().backward()
        return losses.detach()

    compute(first)  # picks kernels, fills the allocators
    with no_waiting():
        losses = compute(second)
        norm = trainer.updater.clip()
    assert bool(losses.isfinite().all())
    assert 0 < float(norm) < float("inf")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():  # the test can fail
        losses.sum().item()


def _preserving(batch: Batch) -> Batch:
    """Returns the batch with two samples whose output is preserved."""
    draws = list(batch.draws)
    for index in (1, 3):
        subset = dataclasses.replace(draws[index].item.subset, custom_attributes={"diff_output_preservation": True})
        draws[index] = dataclasses.replace(draws[index], item=dataclasses.replace(draws[index].item, subset=subset))
    return dataclasses.replace(batch, draws=tuple(draws))


def test_a_step_waits_once(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(job, tmp_path, ["--gradient_checkpointing"])
    monkeypatch.setattr(trainer.updater, "apply", dict)  # the optimizer is another's
    step = TrainStep(trainer.losses_of, trainer.updater, Processes(trainer.accelerator))
    batches = [trainer.data.load(trainer.data.plan_epoch(epoch, 1).batch(0).draws) for epoch in (1, 2)]
    step([batches[0]], len(batches[0].draws), 1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            values = step([batches[1]], len(batches[1].draws), 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in seen if "called a synchronizing" in str(one.message)]) == 1  # its numbers are read
    assert values["loss/current"] > 0
