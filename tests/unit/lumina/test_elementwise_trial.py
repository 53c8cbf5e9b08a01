"""Which kernels do a GPU's elementwise work, and what is said about it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.lumina import elementwise, elementwise_trial
from library.lumina.elementwise_trial import announce_kernels, failure_of, kernels_on

CPU = torch.device("cpu")
HALF = torch.bfloat16


def stand_ins(**others: Any) -> Any:
    """Returns what has the names of the module of kernels: the functions of CPUs, which have the same contracts."""
    plain = {
        "ScaledNorm": elementwise._ScaledNorm,
        "QueriesKeysValues": elementwise._QueriesKeysValues,
        "SwiGLU": elementwise._SwiGLU,
    }
    return SimpleNamespace(**{**plain, **others})


class WrongGradient(elementwise._SwiGLU):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        of_gate, of_value = elementwise._SwiGLU.backward(ctx, *gradients)
        return of_gate, of_value * 1.05


class NotANumber(elementwise._ScaledNorm):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        return elementwise._ScaledNorm.forward(ctx, x, factor, eps, residual) * float("nan")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_results_pass(dtype: torch.dtype) -> None:
    assert failure_of(stand_ins(), CPU, dtype) is None


def test_wrong_results_are_named() -> None:
    assert "a try of SwiGLU gave wrong results (off by 5" in str(failure_of(stand_ins(SwiGLU=WrongGradient), CPU, HALF))
    assert "a try of a norm gave wrong results (off by nan" in str(
        failure_of(stand_ins(ScaledNorm=NotANumber), CPU, HALF)
    )


@pytest.fixture
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: stand_ins())


@pytest.mark.usefixtures("triton_is_there")
def test_a_failed_trial_is_warned_about(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def compiles(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(elementwise_trial, "failure_of", compiles)
    assert kernels_on.__wrapped__(0, HALF) is None
    assert "cannot be used: a try ended with an error (RuntimeError: Failed to find C compiler.)" in caplog.text
    monkeypatch.setattr(elementwise_trial, "failure_of", lambda *_: "it is wrong")
    assert kernels_on.__wrapped__(0, HALF) is None
    assert "cannot be used: it is wrong. torch's operations" in caplog.text


@pytest.mark.usefixtures("triton_is_there")
def test_a_trial_is_not_seen_by_who_looks_at_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise_trial, "failure_of", lambda kernels, device, dtype: failure_of(kernels, CPU, dtype))
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert kernels_on.__wrapped__(0, HALF) is not None
    assert not seen


def test_without_triton_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(elementwise_trial, "kernels_on", kernels_on.__wrapped__)
    with caplog.at_level(logging.INFO):
        announce_kernels(torch.device("cuda", 0), HALF)
    assert [(record.levelname, "torch's operations" in record.message) for record in caplog.records] == [("INFO", True)]


@pytest.mark.parametrize(("device", "dtype"), [("cpu", HALF), ("cuda:0", torch.float32)])
def test_nothing_is_tried_where_no_kernels_are_meant_for(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(elementwise_trial, "kernels_on")
    with caplog.at_level(logging.INFO):
        announce_kernels(torch.device(device), dtype)
    assert not caplog.records


def test_tensors_on_the_cpu_take_no_kernels() -> None:
    assert elementwise._kernels_for(torch.zeros(1, 2, 3, dtype=HALF)) is None
