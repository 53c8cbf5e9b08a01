from __future__ import annotations

import math

import pytest
import torch

from library.lumina.next_dit import AttentionFn, plain_attention
from library.memory.attention import sdpa_attention


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Attention by its definition, in the inputs' precision."""
    shared_by = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared_by, dim=2), v.repeat_interleave(shared_by, dim=2)
    scores = torch.einsum("bshe,bthe->bhst", q, k) / math.sqrt(q.shape[-1])
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -math.inf)
    return torch.einsum("bhst,bthe->bshe", scores.softmax(-1), v)


def inputs(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 13, 6, 24), (2, 13, kv_heads, 24), (2, 13, kv_heads, 24)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("attention", [sdpa_attention, plain_attention])
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_definition_forward_and_backward(attention: AttentionFn, kv_heads: int, masked: bool) -> None:
    mask = torch.arange(13) < torch.tensor([13, 7])[:, None] if masked else None
    results = []
    for function in (attention, written_out):
        tensors = inputs(kv_heads)
        output = function(*tensors, mask)
        output.square().sum().backward()
        results.append([output, *(tensor.grad for tensor in tensors)])
    for ours, expected in zip(*results, strict=True):
        # Float32; the fused kernel sums in blocks.
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_no_mask_reaches_the_kernel_where_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: object) -> torch.Tensor:
        calls.append((k.shape[1], keywords))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    sdpa_attention(*inputs(kv_heads=2), None)
    assert calls == [(2, {"attn_mask": None, "enable_gqa": True})]
