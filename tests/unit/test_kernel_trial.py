"""A trial of kernels: what it says, and that it holds nobody."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from library import kernel_trial
from library.errors import SettingsError
from library.kernel_trial import tried

ROOT = Path(__file__).resolve().parents[2]

HANGS = """
import signal, threading
from library import kernel_trial

kernel_trial.has_triton = lambda: True
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored


def hangs(kernels):
    print("begun", flush=True)
    threading.Event().wait()


try:
    kernel_trial.tried("math", "Sums", hangs)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "has_triton", lambda: True)


@pytest.mark.usefixtures("triton_is_there")
def test_a_trial_is_announced_before_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    def looks(kernels: ModuleType) -> None:
        said.extend(record.message for record in caplog.records)

    with caplog.at_level(logging.INFO):
        assert tried("math", "Sums", looks) is not None
    assert len(said) == 1
    assert "Sums: trying Triton's kernels" in said[0]


@pytest.mark.usefixtures("triton_is_there")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),  # where a kernel's code finds no place
    ],
)
def test_full_memory_is_nothing_that_a_compiler_mends(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    def runs_short(kernels: ModuleType) -> None:
        raise error

    with pytest.raises(SettingsError, match="Sums: the GPU's memory is full") as raised:
        tried("math", "Sums", runs_short)
    assert "compiler" not in str(raised.value)
    assert "stand in" not in caplog.text


@pytest.mark.usefixtures("triton_is_there")
def test_a_compiler_is_asked_for_where_nothing_ran(caplog: pytest.LogCaptureFixture) -> None:
    def fails(kernels: ModuleType) -> None:
        raise PermissionError(13, "Permission denied", "/.triton")

    assert tried("math", "Sums", fails) is None
    assert tried("math", "Products", lambda kernels: "a try gave wrong results") is None
    ended, wrong = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "(PermissionError: [Errno 13] Permission denied: '/.triton'). Triton needs a C compiler (gcc)" in ended
    assert wrong.startswith("Products: Triton's kernels cannot be used: a try gave wrong results. torch's operations")
    assert "compiler" not in wrong


@pytest.mark.usefixtures("triton_is_there")
def test_what_ends_the_program_ends_it() -> None:
    def ends(kernels: ModuleType) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        tried("math", "Sums", ends)


@pytest.mark.skipif(os.name == "nt", reason="signals are sent to processes otherwise there")
def test_an_interrupt_ends_a_trial_that_hangs() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HANGS], env=environment, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "begun\n"
            program.send_signal(signal.SIGINT)
            rest, _ = program.communicate(timeout=60)  # importing is over, so this takes no second
        finally:
            program.kill()
    assert rest == "interrupted\n"
    assert program.returncode == 0
