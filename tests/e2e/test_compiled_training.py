"""``--torch_compile`` and the levels of gradient checkpointing, from the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e_helpers import Job, difference

from library.errors import SettingsError
from library.memory.compilation import check_backend

CACHED = ["--cache_latents", "--cache_text_encoder_outputs", "--train_batch_size=2"]


def test_a_compiled_run_of_several_sizes_gives_the_same_lora(job: Job, tmp_path: Path, train: Callable) -> None:
    """Pictures and captions of one size, with all other switches: ``tests/numerics/test_training_switches.py``."""
    flags = ["--gradient_checkpointing", "--gradient_checkpointing_level=selective"]
    train(job.train_flags(tmp_path / "plain", *CACHED))
    train(job.train_flags(tmp_path / "found", *CACHED, *flags, "--torch_compile", "--dynamo_backend=aot_eager"))
    # Float32 rounded elsewhere; Adam divides gradients by their own size, which shows it where they are smallest.
    assert difference(tmp_path / "plain" / "my.safetensors", tmp_path / "found" / "my.safetensors") < 5e-3


def test_a_compiler_that_torch_does_not_know_ends_before_anything_is_read(
    job: Job, tmp_path: Path, train: Callable
) -> None:
    with pytest.raises(
        SettingsError, match=r"'inducktor' is no compiler .*did you mean 'inductor'.*give one of aot_eager, "
    ):
        train(job.train_flags(tmp_path / "out", "--torch_compile", "--dynamo_backend=inducktor"))
    assert not (tmp_path / "out").exists()


def test_a_compiler_that_cannot_run_is_said_with_what_it_needs(
    job: Job, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        SettingsError, match=r"cannot be used here \(No working C\+\+ compiler found\); on a GPU it needs"
    ):
        train(job.train_flags(tmp_path / "out", "--torch_compile"))


def test_a_compiler_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    class Backend:
        _tags = ()

        def __call__(self, graph: object, inputs: object) -> None:
            no_room()

    caplog.set_level(logging.INFO)
    torch._dynamo.list_backends()
    monkeypatch.setitem(torch._dynamo.backends.registry._BACKENDS, "full", None)
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "full", Backend())
    with pytest.raises(
        SettingsError,
        match=r"the compiler 'full' cannot be used here \(OSError: \[Errno 28\] No space.*"
        r"TORCHINDUCTOR_CACHE_DIR",
    ):
        check_backend("full", torch.device("cpu"))
    assert "Trying the compiler full" in caplog.text
