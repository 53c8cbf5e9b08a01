"""Kernels that run on a CPU, or whose stand-ins do, against attention's definition; and how they deal with padding."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from attention_helpers import fake_flash, fake_sage, heads_of_a_block, over_sequences, written_out

from library.lumina.next_dit import AttentionFn, plain_attention
from library.memory.attention import sdpa_attention
from library.memory.attention_kernels import KERNELS

# Float32; fused kernels sum in blocks.
ROUNDING = {"atol": 2e-5, "rtol": 1e-4}
LENGTHS = [7, 13, 1, 13]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AttentionFn]:
    """Returns a kernel by name, with stand-ins for what is not installed."""
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash("flash_attn", with_sums=False))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake_flash("flash_attn_interface", with_sums=True))
    monkeypatch.setitem(sys.modules, "sageattention", fake_sage())

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa=False):
        assert enable_gqa  # torch's own refuses shared heads without it
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k
        return over_sequences(q, k, v, cu_seq_q, max_q)

    monkeypatch.setattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", varlen_attn)
    # A CPU has no cuDNN; what it would be given goes to torch's own kernels.
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: contextlib.nullcontext())

    def made(name: str) -> AttentionFn:
        return plain_attention if name == "plain" else KERNELS[name].make()

    return made


def results(function: AttentionFn, lengths: list[int], masked: bool, kv_heads: int = 2) -> list[torch.Tensor]:
    """Returns the output at real tokens, and the gradients of q, k and v."""
    tensors, mask = heads_of_a_block(lengths, kv_heads)
    output = function(*tensors, mask if masked else None)
    assert torch.isfinite(output).all()  # at padding too
    real = output[mask]
    (real.square().sum() + real.sum()).backward()
    gradients = [tensor.grad for tensor in tensors]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    return [real, *gradients]


@pytest.mark.parametrize("name", ["sdpa", "plain", "cudnn", "cudnn_wide", "varlen", "flash2", "flash3"])
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_definition_forward_and_backward(
    kernel: Callable[[str], AttentionFn], name: str, kv_heads: int, masked: bool
) -> None:
    lengths = LENGTHS if masked else [13, 13]
    ours, expected = (results(function, lengths, masked, kv_heads) for function in (kernel(name), written_out))
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, **ROUNDING)


@pytest.mark.parametrize("masked", [False, True])
def test_sage_attention_is_called_as_it_wants(kernel: Callable[[str], AttentionFn], masked: bool) -> None:
    tensors, mask = heads_of_a_block(LENGTHS)
    key_mask = mask if masked else None
    found, wanted = kernel("sage")(*tensors, key_mask), written_out(*tensors, key_mask)
    torch.testing.assert_close(found[mask], wanted[mask], **ROUNDING)
    assert torch.isfinite(found).all()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="flex_attention needs a C++ compiler")
def test_flex_attention_equals_the_definition() -> None:
    # It has no gradients on a CPU; those are tested in tests/gpu.
    flex = KERNELS["flex"].make()
    # Blocks of 128 keys: whole, partly padded, all padded, and a last one that is cut off; another shape; no mask.
    for lengths, masked in (([300, 140, 256, 5], True), ([150, 40], True), ([150, 150], False)):
        tensors, mask = heads_of_a_block(lengths)
        key_mask = mask if masked else None
        q, k, v = (tensor.detach() for tensor in tensors)
        found, wanted = flex(q, k, v, key_mask), written_out(q, k, v, key_mask)
        torch.testing.assert_close(found[mask], wanted[mask], **ROUNDING)
        assert torch.isfinite(found).all()


def test_padding_changes_nothing_and_gets_no_gradient(kernel: Callable[[str], AttentionFn]) -> None:
    for name in ("varlen", "flash2", "cudnn", "cudnn_wide"):
        tensors, mask = heads_of_a_block(LENGTHS)
        output = kernel(name)(*tensors, mask)
        (output * mask[:, :, None, None]).square().sum().backward()
        with torch.no_grad():
            other = [tensor.masked_fill(~mask[:, :, None, None], 100.0) for tensor in tensors]
            assert torch.equal(kernel(name)(*other, mask)[mask], output[mask])
        for tensor in tensors:
            assert tensor.grad is not None
            assert tensor.grad[~mask].abs().max() == 0
            assert tensor.grad[mask].abs().max() > 0


def test_no_mask_reaches_the_kernel_where_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: object) -> torch.Tensor:
        calls.append((k.shape[1], keywords))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    tensors, _ = heads_of_a_block([13, 13])
    sdpa_attention(*tensors, None)
    assert calls == [(2, {"attn_mask": None, "enable_gqa": True})]
