"""Attention in fp16 for a model whose residual stream is float32 (``--mixed_precision fp16``).

The kernels that are fast take halves alone. Queries and keys come from norms, so fp16 holds them. Values and the output's
gradient may be of any size, so they are put into units: attention is linear in both. Each head has its own, because heads
differ in size; those that share a key/value head have one in common, because kernels add their gradients up. Units are
such that what a kernel rounds to fp16, gradients of scores, queries, keys and values, stays within it whatever the
numbers are. Kernels sum in float32 and scale by 1 / sqrt(E) before they round.

Where a query gives a key the weight p, its score's gradient is p (1 - p) times how far two products of the row's gradient
with values are apart: with longest values of L and a gradient's row of g no more than g L / 2. Over all keys of a query such
gradients are no more than g L in sum; over all queries of a key, g L / 2 of each.

Shapes: B samples, S tokens, A heads, K key/value heads, G = A / K heads of a group, E head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.memory.attention_masks import AttentionFn
from library.memory.half_products import HALF, SMALLEST_UNIT, in_unit

_LENGTH = 2.0**7  # L, of a head's longest values
_LARGEST = 2.0**15  # of a gradient; half of what fp16 holds, for what is rounded


def in_halves(attention: AttentionFn) -> AttentionFn:
    """Returns attention of float32 tensors, computed in fp16 by a function that takes halves.

    Rows of values and of gradients may be up to 1e19 long.
    """

    def halves(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        half_q, half_k, half_v, unit, messenger = _ToHalves.apply(q, k, v)
        return _FromHalves.apply(attention(half_q, half_k, half_v, key_mask), unit, messenger, q.detach(), k.detach())

    return halves


class _ToHalves(torch.autograd.Function):
    """q (B,S,A,E), k and v (B,S,K,E) in fp16, the units of v (B,1,K,1), and a messenger of that shape.

    The messenger's "gradient" is the units that :class:`_FromHalves` has chosen for gradients. So they come here by the
    graph itself, whoever computes parts of it again or compiles it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        unit = (_longest(v, v.shape[2]) / _LENGTH).clamp_(min=SMALLEST_UNIT)
        ctx.save_for_backward(unit)
        ctx.mark_non_differentiable(unit)
        return q.to(HALF), k.to(HALF), in_unit(v, unit), unit, torch.zeros_like(unit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        of_q, of_k, of_v, _, chosen = gradients
        (unit,) = ctx.saved_tensors
        return of_q * _for_heads(chosen, of_q.shape[2]), of_k * chosen, of_v * (chosen / unit)


class _FromHalves(torch.autograd.Function):
    """``attended`` (B,S,A,E) fp16 times its units, in float32."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, unit: Tensor, messenger: Tensor, q: Tensor, k: Tensor) -> Tensor:
        groups = k.shape[2]
        ctx.save_for_backward(unit, _longest(q, groups), _longest(k, groups))
        return attended * _for_heads(unit, attended.shape[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        unit, longest_query, longest_key = ctx.saved_tensors
        scale = gradient.shape[3] ** -0.5
        rows = _lengths(gradient, unit.shape[2])
        # A score and a query get the gradient of one row; a value and a key that of all rows, of all heads of the group.
        one_row = rows.amax(dim=(1, 3), keepdim=True) * (_LENGTH * scale * longest_key).clamp(min=_LENGTH / 2)
        all_rows = rows.sum(dim=(1, 3), keepdim=True) * (_LENGTH / 2 * scale * longest_query).clamp(min=1)
        chosen = (torch.maximum(one_row, all_rows) / _LARGEST).clamp_(min=SMALLEST_UNIT)
        # The gradient of ``attended`` is the gradient times its unit: that factor is left to the units of gradients.
        return in_unit(gradient, _for_heads(chosen, gradient.shape[2])), None, chosen * unit, None, None


def _lengths(x: Tensor, groups: int) -> Tensor:
    """Returns the lengths of rows (B,S,A,E), by groups of heads: (B,S,K,G)."""
    return torch.linalg.vector_norm(x, dim=-1).unflatten(2, (groups, -1))


def _longest(x: Tensor, groups: int) -> Tensor:
    """Returns the length of the longest row (B,S,A,E) of each sample and group of heads: (B,1,K,1)."""
    return _lengths(x, groups).amax(dim=(1, 3), keepdim=True)


def _for_heads(unit: Tensor, num_heads: int) -> Tensor:
    """Returns the units of groups (B,1,K,1) for each of their heads: (B,1,A,1)."""
    return unit.repeat_interleave(num_heads // unit.shape[2], dim=2)
