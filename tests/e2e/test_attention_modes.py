"""``--attn_mode`` and the flags that mean the same, from the command lines of both programs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from e2e_helpers import Job, difference, python
from PIL import Image

import lumina_minimal_inference
from library.errors import SettingsError


def test_training_by_name_and_by_auto_is_the_same(
    job: Job, tmp_path: Path, train: Callable, capfd: pytest.CaptureFixture
) -> None:
    # Captions of different lengths in one batch, so that both kinds of batches occur.
    more = ["--train_batch_size=3", "--cache_latents", "--cache_text_encoder_outputs"]
    for name, flags in (("auto", []), ("sdpa", ["--attn_mode=sdpa"]), ("alias", ["--xformers", "--mem_eff_attn"])):
        train(job.train_flags(tmp_path / name, *more, *flags))
        log = capfd.readouterr().err
        assert log.count("Attention: torch's scaled_dot_product_attention (flash kernel)") == 1
    for name in ("sdpa", "alias"):
        # The same kernel on the same device: bit for bit.
        assert difference(tmp_path / "auto" / "my.safetensors", tmp_path / name / "my.safetensors") == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--use_flash_attn"],
            "--use_flash_attn: FlashAttention 3 and FlashAttention 2 cannot be used: it needs a CUDA",
        ),
        (["--attn_mode=varlen"], "--attn_mode varlen: torch's varlen_attn cannot be used: it needs a CUDA device"),
        (["--attn_mode=flex"], "--attn_mode flex: torch's flex_attention cannot be used: it has no gradients on cpu"),
        (["--use_sage_attn"], "--use_sage_attn: SageAttention has no gradients, so attention would not be trained"),
        (["--sdpa", "--use_flash_attn"], "--use_flash_attn and --sdpa ask for different attention kernels"),
    ],
)
def test_training_with_what_cannot_be_used_ends_before_anything_is_read(
    job: Job, tmp_path: Path, train: Callable, flags: list[str], says: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        train(job.train_flags(tmp_path / "out", *flags))
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_wrong_mode_is_one_message_and_exit_code_2(job: Job, tmp_path: Path) -> None:
    done = python("lumina_minimal_inference.py", *job.inference_flags, f"--output_dir={tmp_path}", "--attn_mode=cudnn")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--attn_mode cudnn: cuDNN's attention cannot be used: it needs a CUDA device" in done.stderr
    assert "Reading the models" not in done.stderr


def test_drawing_by_name_and_by_auto_is_the_same(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    flags = [*job.inference_flags, "--dtype=fp32", "--gemma2_dtype=fp32", "--ae_dtype=fp32", "--steps=2"]
    pictures = {}
    for mode in ("auto", "sdpa", "flex"):
        lumina_minimal_inference.main([*flags, f"--output_dir={tmp_path / mode}", f"--attn_mode={mode}"])
        (path,) = (tmp_path / mode).iterdir()
        with Image.open(path) as picture:
            pictures[mode] = numpy.asarray(picture).astype(int)
    assert "Attention: torch's flex_attention" in caplog.messages
    assert numpy.array_equal(pictures["auto"], pictures["sdpa"])
    # Float32, summed in another order: at most one level of 255.
    assert numpy.abs(pictures["flex"] - pictures["auto"]).max() <= 1


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--use_flash_attn", "--use_flash_attn: FlashAttention 3 and FlashAttention 2 cannot be used"),
        ("--use_sage_attn", "--use_sage_attn: SageAttention cannot be used: it needs a CUDA device"),
    ],
)
def test_drawing_with_what_cannot_be_used(job: Job, tmp_path: Path, flag: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        lumina_minimal_inference.main([*job.inference_flags, f"--output_dir={tmp_path}", flag])
    assert says in str(caught.value)
