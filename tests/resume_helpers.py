"""Runs of the training program in this process, what they logged, and their continuations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from e2e_helpers import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from trainer_helpers import fresh_accelerate

TIMES = ("time", "speed", "images_per_second", "seconds", "memory")  # what no two runs have in common


@dataclass
class Run:
    """A run of the training program.

    Attributes:
        logged: step -> what was reported at it, in order; times left out.
        error: what it ended with.
    """

    logged: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    error: BaseException | None = None


@contextmanager
def _apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    fresh_accelerate()  # which tests in any order may have left behind
    handlers = list(logging.getLogger().handlers)
    try:
        yield
    finally:
        logging.getLogger().handlers[:] = handlers
        fresh_accelerate()


def train(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None, at_epoch_end: bool = False
) -> Run:
    """Runs the program, with Ctrl+C after a step where asked for: right behind it, or at the end of its epoch."""
    import lumina_train_network
    from library.training.trackers import Trackers

    run = Run()

    def log(self: Trackers, values: dict[str, float], step: int) -> None:
        kept = {name: value for name, value in values.items() if not any(word in name for word in TIMES)}
        if kept:
            run.logged.setdefault(step, []).append(kept)
        if step == stop_after and ("loss/epoch_average" in kept) == at_epoch_end:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, _apart(monkeypatch):
        patch.setattr(Trackers, "log", log)
        try:
            lumina_train_network.main(flags)
        except (KeyboardInterrupt, ValueError) as error:
            run.error = error
    return run


def assert_same_files(first: Path, second: Path) -> None:
    """Every tensor has the same bits, and the content's hash is the same."""
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name]) or a[name].dtype != b[name].dtype] == []
    assert metadata(first)["sshs_model_hash"] == metadata(second)["sshs_model_hash"]


def metadata(path: Path) -> dict[str, str]:
    """Returns a LoRA file's metadata."""
    with safe_open(path, "pt") as file:
        return file.metadata()
