"""--mixed_precision fp16 from the command line: training, previews, caches, what the LoRA is like, drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from e2e_helpers import Job, python
from lora_helpers import metadata_of
from PIL import Image
from quantisation_helpers import relative_error
from safetensors.torch import load_file
from torch import Tensor, nn
from trainer_helpers import fresh_accelerate, made_trainer

import lumina_minimal_inference
from library.memory.half_linear import HalfLinear

FP16 = "--mixed_precision=fp16"


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    fresh_accelerate()
    yield
    fresh_accelerate()


def test_the_whole_program(job: Job, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 2 --d 0\n", encoding="utf-8")
    more = [f"--sample_prompts={prompts}", "--sample_every_n_epochs=1", "--gradient_checkpointing", "--cache_latents"]
    done = python("lumina_train_network.py", *job.train_flags(tmp_path / "out", FP16, *more))
    assert done.returncode == 0, done.stderr
    assert "here bf16 is faster" in done.stderr
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2  # one an epoch
    file = tmp_path / "out" / "my.safetensors"
    assert metadata_of(file)["ss_mixed_precision"] == "fp16"
    tensors = load_file(file)
    assert any(name.startswith("lora_te") for name in tensors)  # Gemma2 is trained too
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_the_lora_is_nearer_to_that_of_float32_than_bf16s(job: Job, tmp_path: Path, train: Callable) -> None:
    learned: dict[str, Tensor] = {}
    for precision in ("no", "bf16", "fp16"):
        folder = tmp_path / precision
        fresh_accelerate()
        train(job.train_flags(folder, f"--mixed_precision={precision}", "--network_train_unet_only"))
        tensors = load_file(folder / "my.safetensors")
        learned[precision] = torch.cat([tensors[name].flatten() for name in sorted(tensors) if "lora_up" in name])
    errors = {name: relative_error(learned[name], learned["no"]) for name in ("bf16", "fp16")}
    assert 0 < errors["fp16"] < errors["bf16"] / 4, errors


def check_that_it_computes_in_halves(dit: Any, gemma2: Any) -> None:
    def halved(model: nn.Module) -> int:
        return sum(isinstance(module, HalfLinear) for module in model.modules())

    assert halved(dit) == 5 * len([*dit.noise_refiner, *dit.context_refiner, *dit.layers])
    assert halved(gemma2) == 7 * len(gemma2.layers)
    attention = dit.layers[0].attention
    value = torch.randn(1, 1, 1, attention.head_dim)
    attended = attention.attention(value, value, value, None)  # of one token: its values, rounded
    assert 0 < relative_error(attended, value) < 2**-11


def test_training_computes_both_models_in_halves(job: Job, tmp_path: Path) -> None:
    trainer = made_trainer(job.train_flags(tmp_path, FP16), last="load_models")
    check_that_it_computes_in_halves(trainer.dit, trainer.text_encoder.model)


def test_drawing_computes_both_models_in_halves(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def painter(models: Any, *_: Any) -> Any:
        made.append(models)
        return SimpleNamespace(draw=lambda prompts: None)

    monkeypatch.setattr(lumina_minimal_inference, "Painter", painter)
    flags = [*job.inference_flags, "--dtype=fp16", "--gemma2_dtype=fp16", f"--output_dir={tmp_path}"]
    lumina_minimal_inference.main(flags)
    (models,) = made
    check_that_it_computes_in_halves(models.dit, models.encoder.model)


@pytest.mark.parametrize("flags", [["--dtype=bf16"], ["--dtype=fp16", "--gemma2_dtype=fp16", "--ae_dtype=fp32"]])
def test_drawing_on_a_card_without_bf16_units(
    job: Job, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("library.memory.half_products.multiplies_bf16", lambda device: False)
    monkeypatch.setattr(lumina_minimal_inference, "Painter", lambda *_: SimpleNamespace(draw=lambda prompts: None))
    lumina_minimal_inference.main([*job.inference_flags, *flags, f"--output_dir={tmp_path}"])
    assert ("--dtype fp16 --gemma2_dtype fp16 --ae_dtype fp32 are made" in caplog.text) == ("--dtype=bf16" in flags)


def test_gemma2_is_computed_in_halves_and_its_cache_knows(job: Job, tmp_path: Path) -> None:
    disk = ["--cache_text_encoder_outputs_to_disk", f"--cache_dir={tmp_path / 'cache'}"]
    trainers = [made_trainer(job.train_flags(tmp_path, *disk, *more), last="start") for more in ([], [FP16])]
    plain, halves = trainers
    assert plain.text_fingerprint() != halves.text_fingerprint()
    features = [trainer.ready_text_encoder().encode(["a red disc"])[0] for trainer in trainers]
    assert features[1].dtype == torch.float32
    assert 0 < relative_error(features[1], features[0]) < 3e-3  # some rounding to 11 bits in each layer


def test_pictures(job: Job, tmp_path: Path) -> None:
    def draw(precision: str, *more: str) -> numpy.ndarray:
        folder = tmp_path / f"{precision}{len(more)}"
        flags = [f"--dtype={precision}", f"--gemma2_dtype={precision}", "--ae_dtype=fp32"]
        given = [flag for flag in job.inference_flags if "dtype" not in flag]
        lumina_minimal_inference.main([*given, *flags, *more, f"--output_dir={folder}"])
        (path,) = folder.glob("*.png")
        with Image.open(path) as picture:
            return numpy.asarray(picture).astype(int)

    whole, bf16, fp16 = draw("fp32"), draw("bf16"), draw("fp16")
    assert not numpy.array_equal(fp16, whole)
    assert numpy.abs(fp16 - whole).mean() < numpy.abs(bf16 - whole).mean() / 2
    assert numpy.abs(draw("fp16", "--fp8_base") - whole).mean() < 20  # as in test_quantised_base
