"""A run that finds the device's memory too small ends with advice, and with what it has learned."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from e2e_helpers import make_job
from trainer_helpers import fresh_accelerate, made_trainer

import lumina_train_network
from library.errors import SettingsError
from library.training.arguments import TrainConfig, parse_arguments
from library.training.out_of_memory import raise_where_a_caption_was_too_long, raise_where_memory_was_short

NEEDED = [
    "--pretrained_model_name_or_path=a",
    "--train_data_dir=b",
    "--output_dir=c",
    "--network_module=networks.lora_lumina",
]
ALL = [
    "--mixed_precision=bf16",
    "--cache_latents",
    "--cache_text_encoder_outputs",
    "--gradient_checkpointing",
    "--fp8_base",
    "--blocks_to_swap=26",
    "--cpu_offload_checkpointing",
]


def config_of(*flags: str) -> TrainConfig:
    config = parse_arguments([*NEEDED, *flags])
    assert config is not None
    return config


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def advice(*flags: str, device: torch.device = CUDA) -> str:
    with pytest.raises(
        SettingsError, match=f"the memory of the device {device.type} is too small for this run"
    ) as raised:
        raise_where_memory_was_short(torch.OutOfMemoryError("CUDA out of memory"), config_of(*flags), device)
    return str(raised.value)


def test_names_the_flags_that_are_not_used_yet() -> None:
    plain = advice()
    for flag in ALL[:-1]:
        assert flag.partition("=")[0] in plain
    assert "--cpu_offload_checkpointing" not in plain  # nearly always slower than checkpointing, so not without it
    assert "--cpu_offload_checkpointing" in advice("--gradient_checkpointing")
    full = advice(*ALL)
    assert "--" not in full
    assert "a smaller batch size or resolution" in full


def test_names_no_flag_that_the_run_may_not_use() -> None:
    assert "--fp8_base" in advice()
    assert "--fp8_base" not in advice("--network_module=os")  # it takes no quantised weights, so the flag ends the run
    on_cpu = advice(device=CPU)
    assert "--gradient_checkpointing" in on_cpu
    assert "--blocks_to_swap" not in on_cpu
    assert "--vram_gb" not in advice()
    assert "--vram_gb" not in advice("--vram_gb=12", device=CPU)


def test_names_what_can_be_raised_or_lowered() -> None:
    assert "a higher --blocks_to_swap" in advice(*ALL, "--blocks_to_swap=8")
    assert "--gradient_checkpointing_level full" in advice(*ALL, "--gradient_checkpointing_level=selective")
    assert "a smaller --vram_gb" in advice(*ALL, "--vram_gb=8")


def test_memory_of_other_devices_is_told_too() -> None:
    for text in ("[enforce fail] DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory (MPS: 1 GB)"):
        with pytest.raises(SettingsError, match="too small for this run"):
            raise_where_memory_was_short(RuntimeError(text), config_of(), CPU)


def test_other_errors_stay_what_they_are() -> None:
    raise_where_memory_was_short(RuntimeError("a defect"), config_of(), CUDA)
    raise_where_a_caption_was_too_long(RuntimeError("a defect"), ["a"], config_of(), CUDA)


def test_a_huge_caption_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(encoder: object, captions: Sequence[str], template: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("library.lumina.gemma2.Gemma2Encoder._encode", short)
    job = make_job(tmp_path / "job")
    flags = job.train_flags(tmp_path, "--cache_text_encoder_outputs", "--mixed_precision=bf16", "--blocks_to_swap=2")
    handlers = list(logging.getLogger().handlers)
    try:
        trainer = made_trainer(flags, last="plan_steps")
        with pytest.raises(
            SettingsError, match=r"Gemma2 with a caption of \d+ characters \('a red disc, number"
        ) as raised:
            trainer.cache_text()
    finally:
        fresh_accelerate()
        logging.getLogger().handlers[:] = handlers
    assert "--gemma2_max_token_length below 256" in str(raised.value)
    assert "--fp8_base" in str(raised.value)
    assert "--mixed_precision" not in str(raised.value)
    assert "--blocks_to_swap" not in str(raised.value)


def test_a_run_saves_what_it_has_learned_and_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    losses_of = lumina_train_network.LuminaNetworkTrainer.losses_of

    def short_in_step_3(trainer: lumina_train_network.LuminaNetworkTrainer, batch: object) -> object:
        calls.append(batch)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses_of(trainer, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(lumina_train_network.LuminaNetworkTrainer, "losses_of", short_in_step_3)
    handlers = list(logging.getLogger().handlers)
    fresh_accelerate()
    try:
        job = make_job(tmp_path / "job")
        with pytest.raises(SettingsError, match="--gradient_checkpointing keeps far fewer activations"):
            lumina_train_network.main(job.train_flags(tmp_path / "out", "--cache_latents"))
    finally:
        fresh_accelerate()
        logging.getLogger().handlers[:] = handlers
    assert list((tmp_path / "out").glob("my*.safetensors"))
