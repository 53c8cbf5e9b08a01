"""The trainer on a stand-in for a CUDA device: every tensor is where it belongs, and the host waits where it is meant to.

Numbers are not looked at. ``tests/gpu`` does that on a real one.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import Job, make_job
from fake_cuda_helpers import DEVICE, FakeCuda, fake_cuda
from torch import Tensor
from trainer_helpers import made_trainer

from library.data.items import Batch
from library.lumina.drawing import to_pictures
from library.memory.attention import AttentionChoice
from library.memory.attention_kernels import KERNELS
from library.memory.half_attention import in_halves
from library.prompts import Prompt
from library.training.processes import Processes
from library.training.step import TrainStep

CACHES = ["--cache_latents", "--cache_text_encoder_outputs"]
SELECTIVE = ["--gradient_checkpointing", "--gradient_checkpointing_level=selective"]
HALF = torch.bfloat16


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as mode:
        yield mode
        gc.collect()  # what a test streamed ends here, and not as a wait in another test


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def trainer_of(cuda: FakeCuda, job: Job, folder: Path, *flags: str, fast: bool = False) -> Any:
    """Returns a trainer that knows its data and has read no model, on the host."""
    given = job.train_flags(folder / "out", "--mixed_precision=bf16", "--train_batch_size=2", *flags)
    with cuda.meta_is_meta():
        trainer = made_trainer(given, "build_data")
    trainer.plan_steps()
    quantisation = dataclasses.replace(trainer.config.quantisation, fp8_fast=fast)  # --fp8_fast would not start here
    trainer.config = dataclasses.replace(trainer.config, quantisation=quantisation)
    return trainer


def bring_to(cuda: FakeCuda, trainer: Any, kernel: str = "varlen") -> None:
    """Reads the models to the device, with the kernels that are taken there where nothing is installed."""
    trainer.device = DEVICE
    equal, ragged = KERNELS["sdpa"].make(), KERNELS[kernel].make()

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return equal(q, k, v, None) if key_mask is None else ragged(q, k, v, key_mask)

    function = in_halves(attention) if trainer.config.memory.in_halves else attention
    trainer.attention = AttentionChoice(function, "sdpa", kernel, "")
    with cuda.meta_is_meta():
        trainer.load_models()
        trainer.build_network()
        trainer.build_optimizer()
    cuda.waits.clear()
    cuda.product_dtypes.clear()


def batch_of(trainer: Any, lengths: Sequence[int] = (9, 4), **more: Any) -> Batch:
    """Returns a batch of two pictures, as caches and readers give it."""
    item = trainer.data.items[0]
    draws = tuple(trainer.data.draw(item.index, 1, repeat) for repeat in range(2))
    width, height = item.bucket_px
    latents = torch.randn(2, 16, height // 8, width // 8).to(HALF)
    text = tuple(torch.randn(length, trainer.rehearsal_sizes().feature_width).to(HALF) for length in lengths)
    return dataclasses.replace(Batch(draws, latents, None, text, torch.ones(2), 2), **more)


CASES: dict[str, list[str]] = {
    "plain": [],
    "checkpointing, dropouts": ["--gradient_checkpointing", "--network_dropout=0.1", "--network_args", "rank_dropout=0.1",
                                "module_dropout=0.1"],
    "selective": SELECTIVE,
    "fp8": ["--fp8_base", *SELECTIVE],
    "fp8_fast": ["--fp8_base"],
    "streaming, selective": ["--blocks_to_swap=2", *SELECTIVE],
    "streaming": ["--blocks_to_swap=2", "--gradient_checkpointing"],
    "fp16": ["--mixed_precision=fp16", "--gradient_checkpointing"],
    "fp16, fp8": ["--mixed_precision=fp16", "--fp8_base", "--blocks_to_swap=2", *SELECTIVE],
    "full_bf16": ["--full_bf16", "--ema_decay=0.9", "--network_args", "split_qkv=true"],
    "losses": ["--ip_noise_gamma=0.1", "--ip_noise_gamma_random_strength", "--loss_type=huber", "--huber_schedule=snr",
               "--model_prediction_type=sigma_scaled"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, "varlen") for name in CASES), ("plain", "cudnn"), ("selective", "cudnn")]
)
def test_a_step_waits_once(cuda: FakeCuda, job: Job, tmp_path: Path, name: str, kernel: str) -> None:
    flags = CASES[name]
    trainer = trainer_of(cuda, job, tmp_path, *CACHES, *flags, fast=name == "fp8_fast")
    bring_to(cuda, trainer, kernel)
    step = TrainStep(trainer.losses_of, trainer.updater, Processes(trainer.accelerator))
    height, width = batch_of(trainer).latents.shape[-2:]  # type: ignore[union-attr]
    batches = [batch_of(trainer, masks=torch.rand(2, height, width))]  # captions of different lengths
    batches += [] if flags else [batch_of(trainer, lengths=(7, 7))]
    for number, batch in enumerate(batches, start=1):
        step([batch], 2, number)
        assert len(cuda.waits) == 1, cuda.waits
        assert "step.py" in cuda.waits[0]  # the step's numbers are read
        cuda.waits.clear()
    # The model computes in bf16 alone; the time's embedding too. In fp16 small matrices and the LoRA are float32.
    in_halves = trainer.config.memory.in_halves
    assert cuda.product_dtypes == ({torch.float16, torch.float32} if in_halves else {HALF})
    trained = torch.bfloat16 if "--full_bf16" in flags else torch.float32
    for parameter in trainer.updater.parameters:
        assert (parameter.device, parameter.dtype) == (DEVICE, trained)
        for value in trainer.optimizer.state[parameter].values():
            assert value.dim() == 0 or value.device == DEVICE


def test_samples_whose_output_is_preserved(cuda: FakeCuda, job: Job, tmp_path: Path) -> None:
    trainer = trainer_of(cuda, job, tmp_path, *CACHES)
    bring_to(cuda, trainer)
    batch = batch_of(trainer)
    subset = dataclasses.replace(batch.draws[1].item.subset, custom_attributes={"diff_output_preservation": True})
    item = dataclasses.replace(batch.draws[1].item, subset=subset)
    draws = (batch.draws[0], dataclasses.replace(batch.draws[1], item=item))
    losses, sigma = trainer.losses_of(dataclasses.replace(batch, draws=draws))
    losses.sum().backward()
    assert (losses.dtype, sigma.dtype) == (torch.float32, torch.float32)
    assert cuda.waits == []


@pytest.mark.parametrize("trained", [True, False], ids=["Gemma2 trained", "Gemma2 frozen"])
def test_without_caches_nothing_waits(cuda: FakeCuda, job: Job, tmp_path: Path, trained: bool) -> None:
    more = ["--weighted_captions"] + ([] if trained else ["--network_train_unet_only"])
    trainer = trainer_of(cuda, job, tmp_path, *more)
    bring_to(cuda, trainer)
    batch = batch_of(trainer, text=None, latents=None)
    draws = tuple(
        dataclasses.replace(draw, caption=text)
        for draw, text in zip(batch.draws, ("a (red:1.3) disc", "b"), strict=True)
    )
    width, height = draws[0].item.bucket_px
    pixels = torch.rand(2, 3, height, width)
    losses, _ = trainer.losses_of(dataclasses.replace(batch, draws=draws, pixels=pixels))
    losses.sum().backward()
    assert cuda.waits == []
    assert trainer.text_encoder.model.embed_tokens.weight.device.type == "cpu"


def test_validation_and_previews(cuda: FakeCuda, job: Job, tmp_path: Path) -> None:
    trainer = trainer_of(cuda, job, tmp_path, *CACHES)
    bring_to(cuda, trainer)
    losses = trainer.validation_losses(batch_of(trainer), [0.1, 0.9])
    assert (losses.shape, losses.dtype, losses.device) == ((2, 2), torch.float32, DEVICE)
    assert cuda.waits == []
    width = trainer.rehearsal_sizes().feature_width
    # A batch of two, guided in some of the steps and by texts of other lengths.
    prompts = [Prompt(prompt="a", width=64, height=64, sample_steps=4, cfg_trunc_ratio=0.5),
               Prompt(prompt="b", width=64, height=64, sample_steps=4, cfg_trunc_ratio=0.5)]  # fmt: skip
    for prompt in prompts:
        trainer._prompt_features[prompt] = (torch.randn(5, width).to(HALF), torch.randn(3, width).to(HALF))
    with cuda.meta_is_meta():
        trainer.ready_autoencoder()
    cuda.waits.clear()
    with torch.no_grad():
        pictures = trainer.draw(prompts, [0, 1])
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    # Whether the pixels are finite, and the pixels, of each picture; drawing itself waits for nothing.
    assert len(cuda.waits) == 4, cuda.waits
    assert all("drawing.py" in wait for wait in cuda.waits)
    cuda.waits.clear()
    latents = trainer.encode_pictures(torch.rand(2, 3, 64, 64))
    assert (latents.device, latents.dtype) == (DEVICE, torch.float32)
    assert to_pictures(trainer.autoencoder.decode, latents)


@pytest.mark.parametrize("streamed", [False, True])
def test_captions_are_encoded_with_the_embedding_on_the_cpu(
    cuda: FakeCuda, job: Job, tmp_path: Path, streamed: bool
) -> None:
    trainer = trainer_of(cuda, job, tmp_path, *CACHES, *(["--blocks_to_swap=2"] if streamed else []))
    trainer.device = DEVICE
    with cuda.meta_is_meta():
        encoder = trainer.ready_text_encoder()
    assert (trainer.text_stream is not None) == streamed
    cuda.waits.clear()
    with torch.no_grad():
        features = encoder.encode(["a red disc", "b"])
    assert {(feature.device, feature.dtype) for feature in features} == {(DEVICE, HALF)}
    assert cuda.waits == []


def test_a_wait_in_a_step_would_show(cuda: FakeCuda, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(cuda, job, tmp_path, *CACHES)
    bring_to(cuda, trainer)
    from library.lumina import flow

    add_noise = flow.add_noise

    def waiting(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return add_noise(latents, noise, sigma) * float(sigma.max())

    monkeypatch.setattr(flow, "add_noise", waiting)
    trainer.losses_of(batch_of(trainer))
    assert len(cuda.waits) == 1
    monkeypatch.setattr(flow, "add_noise", lambda latents, noise, sigma: add_noise(latents, noise, sigma.cpu()))
    with pytest.raises(RuntimeError, match="same device"):
        trainer.losses_of(batch_of(trainer))
