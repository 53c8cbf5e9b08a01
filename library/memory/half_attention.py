"""Attention in fp16 for a model whose residual stream is float32 (``--mixed_precision fp16``).

The kernels that are fast take halves alone. Queries and keys come from norms, so fp16 holds them. Values and the output's
gradient may be of any size, so each sample's are put into a unit: attention is linear in both. Units are chosen so that
what a kernel makes inside, gradients of scores, and the gradients of queries and values stay within fp16 whatever the
numbers are. A key's gradient is a sum over all queries. Its unit takes their signs for random: a bound for signs that all
agree would leave gradients of scores too few digits.

Shapes: B samples, S tokens, A heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.memory.attention_masks import AttentionFn
from library.memory.half_products import HALF, SMALLEST_UNIT, in_unit

_LENGTH = 2.0**7  # of the longest row of a sample's values
_LARGEST = 2.0**15


def in_halves(attention: AttentionFn) -> AttentionFn:
    """Returns attention of float32 tensors, computed in fp16 by a function that takes halves."""

    def halves(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        half_q, half_k, half_v, unit, messenger = _ToHalves.apply(q, k, v)
        return _FromHalves.apply(attention(half_q, half_k, half_v, key_mask), unit, messenger, q.detach(), k.detach())

    return halves


class _ToHalves(torch.autograd.Function):
    """q (B,S,A,E), k and v (B,S,K,E) in fp16, the unit of v (B,1,1,1), and a messenger of that shape.

    The messenger's "gradient" is the unit that :class:`_FromHalves` has chosen for gradients. So it comes here by the graph
    itself, whoever computes parts of it again or compiles it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        unit = (_longest(v) / _LENGTH).clamp_(min=SMALLEST_UNIT)
        ctx.save_for_backward(unit)
        ctx.mark_non_differentiable(unit)
        return q.to(HALF), k.to(HALF), in_unit(v, unit), unit, torch.zeros_like(unit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        of_q, of_k, of_v, _, unit_of_gradients = gradients
        (unit,) = ctx.saved_tensors
        return of_q * unit_of_gradients, of_k * unit_of_gradients, of_v * (unit_of_gradients / unit)


class _FromHalves(torch.autograd.Function):
    """``attended`` (B,S,A,E) fp16 times its unit, in float32."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, unit: Tensor, messenger: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(unit, _longest(q), _longest(k))
        ctx.shared_by = q.shape[2] // k.shape[2]
        return attended * unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        unit, longest_query, longest_key = ctx.saved_tensors
        norm, shared_by = torch.linalg.vector_norm, ctx.shared_by
        rows = norm(gradient, dim=-1, keepdim=True)  # (B,S,A,1)
        # A score's gradient is its weight times no more than twice a row of the gradient times one of values. A query's is
        # a sum of those times keys, and its weights' sum is 1; a key's is a sum over queries, of all heads that share it.
        of_queries = 2 * _LENGTH * rows.amax(dim=(1, 2), keepdim=True) * longest_key.clamp(min=1)
        of_keys = 2 * _LENGTH * norm(rows, dim=1, keepdim=True).amax(dim=2, keepdim=True) * longest_query * shared_by
        of_values = norm(gradient, ord=1, dim=1, keepdim=True).amax(dim=(2, 3), keepdim=True) * shared_by
        largest = torch.maximum(torch.maximum(of_queries, of_keys), of_values)
        chosen = (largest / _LARGEST).clamp_(min=SMALLEST_UNIT)
        # The gradient of ``attended`` is the gradient times the unit: that factor is left to the unit of gradients.
        return in_unit(gradient, chosen), None, chosen * unit, None, None


def _longest(x: Tensor) -> Tensor:
    """Returns the length of each sample's longest row (B,1,1,1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).amax(dim=(1, 2), keepdim=True)
