"""Attention by its definition, inputs for it, and stand-ins for packages that are not installed."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import torch
from torch import Tensor


def written_out(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Attention by its definition, in the inputs' precision: (B,S,A,E) from the shapes of ``AttentionFn``."""
    shared_by = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared_by, dim=2), v.repeat_interleave(shared_by, dim=2)
    scores = torch.einsum("bshe,bthe->bhst", q, k) / math.sqrt(q.shape[-1])
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -math.inf)
    return torch.einsum("bhst,bthe->bshe", scores.softmax(-1), v)


def over_sequences(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """What a variable-length kernel computes, sequence by sequence: (R,A,E) from rows of tokens.

    As the real kernels, it leaves rows outside all sequences uninitialised; here they are NaN.
    """
    output = torch.full_like(q, math.nan)
    edges = bounds.tolist()
    for begin, end in itertools.pairwise(edges):
        assert 0 <= end - begin <= longest
        if end > begin:
            rows = slice(begin, end)
            output = torch.cat(
                [output[:begin], written_out(q[None, rows], k[None, rows], v[None, rows], None)[0], output[end:]]
            )
    return output


def heads_of_a_block(
    lengths: list[int], kv_heads: int = 2, heads: int = 6, head_dim: int = 24
) -> tuple[list[Tensor], Tensor]:
    """Returns q, k, v as an attention block makes them (v is a strided part of wider rows), and the key mask.

    Args:
        lengths: real tokens of each sample; the largest one is S.
        kv_heads: K.
        heads: A.
        head_dim: E.

    Returns:
        [q (B,S,A,E), k (B,S,K,E), v (B,S,K,E)] float32, leaves for q and k; and (B,S) bool.
    """
    generator = torch.Generator().manual_seed(0)
    length = max(lengths)
    whole = torch.randn((len(lengths), length, heads + 2 * kv_heads, head_dim), generator=generator)
    q, k, v = whole.split([heads, kv_heads, kv_heads], dim=2)
    tensors = [q.clone(), k.clone(), v.detach()]
    return [tensor.requires_grad_() for tensor in tensors], torch.arange(length) < torch.tensor(lengths)[:, None]


def fake_flash(name: str, with_sums: bool) -> ModuleType:
    """Returns a stand-in for flash-attn 2 or 3 that computes the definition, with the parameters that both have.

    Args:
        name: of the package.
        with_sums: as the first versions of FlashAttention 3, it returns a second value.
    """
    module = ModuleType(name)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False):
        assert softmax_scale is None
        assert not causal
        output = written_out(q, k, v, None)
        return (output, None) if with_sums else output

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1  # all that the kernels ask of strides
        output = over_sequences(q, k, v, cu_seqlens_q, max_seqlen_q)
        return (output, None) if with_sums else output

    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


def fake_sage() -> ModuleType:
    """Returns a stand-in for sageattention that computes the definition, without gradients."""
    module = ModuleType("sageattention")

    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
        assert tensor_layout == "NHD"
        assert not is_causal
        return written_out(q, k, v, None).detach()

    def sageattn_varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> Tensor:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k
        return over_sequences(q, k, v, cu_seqlens_q, max_seqlen_q).detach()

    module.sageattn = sageattn  # type: ignore[attr-defined]
    module.sageattn_varlen = sageattn_varlen  # type: ignore[attr-defined]
    return module
