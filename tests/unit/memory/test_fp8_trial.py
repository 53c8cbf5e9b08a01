"""Which kernels quantise for products in fp8, and what is said about it; Linears that share an input quantise it once."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantisation_helpers import emulated_product, realistic_tokens, realistic_weight
from torch import Tensor, nn

from library.lumina.next_dit import FeedForward
from library.memory import fp8, fp8_trial
from library.memory.fp8 import Fp8Linear, TokensOnce, quantise_rows
from library.memory.fp8_trial import failure_of, kernels_on
from library.memory.quantised import quantise_block
from networks.lora import LoRAModule

CPU = torch.device("cpu")


def rows(matrix: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return quantise_rows(matrix if factor is None else matrix * factor.to(matrix.dtype))


def transposed(codes: Tensor) -> tuple[Tensor, Tensor]:
    return codes.t().contiguous(), torch.ones(1, codes.shape[1])


def stand_ins(**others: Any) -> Any:
    """Returns what has the names of the module of kernels: torch's operations, which have the same contracts."""
    return SimpleNamespace(**{"quantise_rows": rows, "transpose": transposed, **others})


def test_right_results_pass() -> None:
    assert failure_of(stand_ins(), CPU) is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"quantise_rows": lambda matrix, factor=None: rows(matrix)}, "quantising a gradient gave wrong"),
        (
            {"quantise_rows": lambda matrix, factor=None: (rows(matrix)[0], rows(matrix)[1] * 2)},
            "quantising gave wrong",
        ),
        ({"transpose": lambda codes: (codes.view(codes.shape[::-1]), torch.ones(1, codes.shape[1]))}, "transposing"),
        ({"transpose": lambda codes: (codes.t(), torch.zeros(1, codes.shape[1]))}, "transposing"),
    ],
)
def test_wrong_results_are_named(wrong: dict[str, Any], says: str) -> None:
    assert says in str(failure_of(stand_ins(**wrong), CPU))


def test_a_failed_trial_is_warned_about(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: stand_ins())
    monkeypatch.setattr(fp8_trial, "failure_of", lambda kernels, device: "it is wrong")
    assert kernels_on.__wrapped__(0) is None
    assert "Quantising for --fp8_fast: Triton's kernels cannot be used: it is wrong. torch's operations" in caplog.text
    monkeypatch.setattr(fp8_trial, "failure_of", lambda kernels, device: failure_of(kernels, CPU))
    assert kernels_on.__wrapped__(0) is not None


def test_tensors_on_the_cpu_take_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fp8, "kernels_on")
    assert fp8._kernels_for(torch.zeros(2, 16, dtype=torch.bfloat16)) is None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what is quantised; products by their definition."""
    shapes: list[torch.Size] = []

    def counting(matrix: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(matrix.shape)
        return quantise_rows(matrix)

    monkeypatch.setattr(fp8, "scaled_product", emulated_product)
    monkeypatch.setattr(fp8, "quantise_rows", counting)
    return shapes


def feed_forward() -> FeedForward:
    block = FeedForward(32, 64).bfloat16().requires_grad_(False)
    quantise_block(block, ("w1", "w2", "w3"), "fp8_fast", CPU)
    return block


def test_what_two_linears_are_given_is_quantised_once(counted: list[torch.Size]) -> None:
    block = feed_forward()
    x = realistic_tokens(6, 32).view(2, 3, 32).bfloat16().requires_grad_()
    del counted[:]
    for _ in range(2):
        y = block(x)
    assert counted == [(6, 32), (6, 64)] * 2  # w1 and w3 together, w2
    for linear in (block.w1, block.w3):
        linear._tokens_once = None
    assert torch.equal(block(x), y)
    assert counted[4:] == [(6, 32), (6, 32), (6, 64)]


@pytest.mark.parametrize("adapted", [("w1",), ("w3",), ("w1", "w3")])
def test_linears_with_a_lora_share_too(adapted: tuple[str, ...], counted: list[torch.Size]) -> None:
    """Theirs is another function; what it is given has to be the very tensor."""
    block = feed_forward()
    for name in adapted:
        LoRAModule(name, getattr(block, name), rank=4).apply_to()
    x = realistic_tokens(6, 32).view(2, 3, 32).bfloat16().requires_grad_()
    del counted[:]
    y = block(x)
    assert type(block.w1(x).grad_fn).__name__.startswith("LinearWithLoRA") == ("w1" in adapted)
    assert counted[:2] == [(6, 32), (6, 64)]  # w1 and w3 together, w2
    assert len(torch.autograd.grad(y.sum(), x)) == 1


def test_recomputation_quantises_once_too(counted: list[torch.Size]) -> None:
    from torch.utils.checkpoint import checkpoint

    from library.memory.recompute import selective_contexts

    block = feed_forward()
    x = realistic_tokens(6, 32).view(2, 3, 32).bfloat16().requires_grad_()
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    for further in ({}, {"context_fn": selective_contexts}):
        del counted[:]
        y = checkpoint(block, x, use_reentrant=False, **further)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert counted == [(6, 32), (6, 64)] * 2 + [(6, 32), (6, 64), (6, 64)]
        assert torch.equal(gradient, expected)


def test_another_tensor_is_quantised_anew(counted: list[torch.Size]) -> None:
    once = TokensOnce(2)
    x = realistic_tokens(3, 32)
    first = once(x)
    x.mul_(2)
    second = once(x)  # it was written to
    assert not torch.equal(first[1], second[1])
    assert once(x) is second
    other = once(x.clone())
    assert other is not second
    assert len(counted) == 3
    with torch.inference_mode():
        y = realistic_tokens(3, 32)
        assert once(y) is not once(y)


def test_codes_are_not_kept_after_the_last_use(counted: list[torch.Size]) -> None:
    once, x = TokensOnce(2), realistic_tokens(3, 32)
    once(x)
    assert once._made is not None
    once(x)
    assert once._made is None
    once(x)
    assert len(counted) == 2
    copy = x.clone()
    once(copy)
    del copy
    gc.collect()
    once(x)  # nothing holds the tensor itself
    assert len(counted) == 4


def test_only_products_in_fp8_share() -> None:
    class Three(nn.Module):
        SAME_INPUT = ("a", "b", "c")

        def __init__(self) -> None:
            super().__init__()
            for name, width in (("a", 32), ("b", 24), ("c", 32)):
                setattr(self, name, nn.Linear(32, width, bias=False))

    block = Three().bfloat16().requires_grad_(False)
    quantise_block(block, ("a", "b", "c"), "fp8_fast", CPU)
    assert block.a._tokens_once is block.c._tokens_once is not None
    assert block.b._tokens_once is None  # the hardware cannot take it
    plain = Three().requires_grad_(False)
    quantise_block(plain, ("a", "c"), "fp8", CPU)
    assert plain.a._tokens_once is None
    assert isinstance(Fp8Linear.of(realistic_weight(32, 32), fast=True)._tokens_once, type(None))
