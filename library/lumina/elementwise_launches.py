"""Norms, rotation and SwiGLU by Triton kernels, with gradients: one launch each way (and a sum where a factor is trained).

Importing this needs the package triton. Who may be given a tensor is decided in ``elementwise_trial``; the contracts of the
functions stand in ``elementwise``, the arithmetic in ``elementwise_kernels``. What autograd keeps are inputs alone.

Shapes: B batch, S tokens, D width, A heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from library.kernel_launch import Launcher, pieces
from library.lumina import elementwise_kernels as kernels

__all__ = ["QueriesKeysValues", "ScaledNorm", "SwiGLU"]

_HEADS_AT_ONCE = 8  # heads of a token that one pass of a program turns
_SWIGLU_BLOCK = 2048
_UNIT = 16  # numbers
_FEW_TOKENS = 4096  # of a batch: so few that programs of more rows would leave a large GPU idle
_ROWS = (4, 8)  # whose part of a factor's gradient one program adds up: of few tokens, of more

_norm_forward, _norm_backward = Launcher(kernels.norm_forward), Launcher(kernels.norm_backward)
_rotate_forward, _rotate_backward = Launcher(kernels.rotate_forward), Launcher(kernels.rotate_backward)
_swiglu_forward, _swiglu_backward = Launcher(kernels.swiglu_forward), Launcher(kernels.swiglu_backward)


def _tile(num_heads: int, channels: int) -> tuple[int, int]:
    """Returns the powers of two of heads and channels that are turned at once."""
    return min(triton.next_power_of_2(num_heads), _HEADS_AT_ONCE), triton.next_power_of_2(channels)


def _own(x: Tensor, numbers: int) -> int:
    """Returns 1 if each sample has ``numbers`` of its own in ``x``, 0 if all share them."""
    return int(x.numel() > numbers)


class ScaledNorm(torch.autograd.Function):
    """See :func:`library.lumina.elementwise.scaled_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.eps = eps
        batch, tokens, width = x.shape
        x, factor = x.contiguous(), factor.contiguous()
        out = torch.empty_like(x)
        added = x if residual is None else residual.contiguous()
        piece, warps = pieces(width)
        constants = (width, piece, residual is not None)
        _norm_forward((tokens, batch, 1), (x, factor, added, out), (_own(factor, width), eps), constants, warps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        _, sums, _, has_residual = ctx.needs_input_grad
        of_residual = gradient if has_residual else None
        if not (sums or ctx.needs_input_grad[0]):
            return None, None, None, of_residual
        batch, tokens, width = x.shape
        x, scale = x.contiguous(), factor.contiguous()
        of_x = torch.empty_like(x)
        rows = _ROWS[batch * tokens > _FEW_TOKENS] if sums else 1
        groups = -(-tokens // rows)
        partial = torch.empty((batch, groups, width), dtype=torch.float32, device=x.device) if sums else of_x
        piece, warps = pieces(width)
        warps *= 1 + sums  # one warp has no registers for the sums as well
        constants = (width, piece, rows, sums)
        tensors = (x, scale, gradient.contiguous(), of_x, partial)
        _norm_backward((groups, batch, 1), tensors, (tokens, _own(factor, width), ctx.eps), constants, warps)
        of_factor = partial.sum_to_size(factor.shape).to(factor.dtype) if sums else None
        return of_x if ctx.needs_input_grad[0] else None, of_factor, None, of_residual


class QueriesKeysValues(torch.autograd.Function):
    """See :func:`library.lumina.elementwise.queries_keys_values`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, q_weight, k_weight, rope)
        ctx.num_heads, ctx.eps = num_heads, eps
        batch, tokens, all_heads, channels = qkv.shape
        num_kv = (all_heads - num_heads) // 2
        qkv, rope = qkv.contiguous(), rope.contiguous()
        q = torch.empty((batch, tokens, num_heads, channels), dtype=qkv.dtype, device=qkv.device)
        k = torch.empty((batch, tokens, num_kv, channels), dtype=qkv.dtype, device=qkv.device)
        numbers = (_own(rope, tokens * channels), eps)
        constants = (num_heads, num_kv, channels, *_tile(num_heads, channels))
        _rotate_forward((tokens, batch, 1), (qkv, q_weight, k_weight, rope, q, k), numbers, constants, 4)
        return q, k, qkv[:, :, num_heads + num_kv :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor, of_v: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, rope = ctx.saved_tensors
        batch, tokens, _, channels = qkv.shape
        num_heads, num_kv = ctx.num_heads, of_k.shape[2]
        of_weights: list[Tensor | None] = [None, None]
        for index, (weight, gradient, first) in enumerate([(q_weight, of_q, 0), (k_weight, of_k, num_heads)]):
            if ctx.needs_input_grad[2 + index]:  # is frozen as a rule
                heads = qkv[:, :, first : first + gradient.shape[2]]
                of_weights[index] = _gradient_of_weight(heads, weight, rope, gradient, ctx.eps)
        if not ctx.needs_input_grad[0]:
            return None, None, *of_weights, None, None
        qkv, rope = qkv.contiguous(), rope.contiguous()
        of_qkv = torch.empty_like(qkv)
        tensors = (qkv, q_weight, k_weight, rope, of_q.contiguous(), of_k.contiguous(), of_v.contiguous(), of_qkv)
        numbers = (_own(rope, tokens * channels), ctx.eps)
        constants = (num_heads, num_kv, channels, *_tile(num_heads, channels))
        _rotate_backward((tokens, batch, 1), tensors, numbers, constants, 4)
        return of_qkv, None, *of_weights, None, None


def _gradient_of_weight(x: Tensor, weight: Tensor, rope: Tensor, gradient: Tensor, eps: float) -> Tensor:
    turned = torch.view_as_complex(gradient.float().contiguous().unflatten(-1, (-1, 2)))
    turned_back = torch.view_as_real(turned * torch.view_as_complex(rope).conj()).flatten(-2)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (turned_back * normed).sum_to_size(weight.shape).to(weight.dtype)


class SwiGLU(torch.autograd.Function):
    """See :func:`library.lumina.elementwise.swiglu`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        gate, value = gate.contiguous(), value.contiguous()
        out = torch.empty_like(gate)
        programs, units, unit = _parts(gate.numel())
        _swiglu_forward((programs, 1, 1), (gate, value, out), (units,), (unit, _SWIGLU_BLOCK), 8)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = (saved.contiguous() for saved in ctx.saved_tensors)
        of_gate, of_value = torch.empty_like(gate), torch.empty_like(gate)
        programs, units, unit = _parts(gate.numel())
        tensors = (gate, value, gradient.contiguous(), of_gate, of_value)
        _swiglu_backward((programs, 1, 1), tensors, (units,), (unit, _SWIGLU_BLOCK), 8)
        return of_gate, of_value


def _parts(count: int) -> tuple[int, int, int]:
    """Returns the number of programs for ``count`` numbers, and the two factors that ``count`` is given to them in."""
    unit = 1 if count % _UNIT else _UNIT
    return -(-count // _SWIGLU_BLOCK), count // unit, unit
