"""The arithmetic between a block's matrix products: norms, modulation, gates, SwiGLU and rotation, fused by hand.

Written out as single operations, these steps make autograd keep each of their results: more than the matrix products
need. Here each step is one function with a gradient of its own, which keeps only its inputs (they are kept anyway) and a
factor a row, and computes the rest again. Norms and rotation are float32 arithmetic with one rounding at the end, whatever
the inputs are; SwiGLU rounds twice in bf16, once behind silu, as the reference program does.

Under ``torch.compile`` the same formulas are left to the compiler, which fuses further and chooses itself what to keep.

Shapes: B batch, S tokens, D width, E head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["normalise_and_rotate", "rms_factor", "scaled_norm", "swiglu"]


def scaled_norm(x: Tensor, factor: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Returns residual + x / sqrt(mean(x^2) + eps) * factor, the mean over the last axis, in ``x``'s dtype.

    Args:
        x: (B,S,D).
        factor: float32, (D,) or (B,1,D): the norm's weight times what scales or gates its result.
        eps: added to the mean square.
        residual: (B,S,D); None adds nothing.
    """
    if torch.compiler.is_compiling():
        wide = _wide(x)
        normed = wide * rms_factor(wide, eps) * factor
        return (normed if residual is None else normed + residual).to(x.dtype)
    return _ScaledNorm.apply(x, factor, eps, residual)


def normalise_and_rotate(x: Tensor, weight: Tensor, rope: Tensor, eps: float) -> Tensor:
    """Returns the heads normalised, weighted, and each pair of neighbouring channels turned, in ``x``'s dtype.

    Args:
        x: (B,S,heads,E).
        weight: (E,) of the norm.
        rope: (B or 1,S,1,E/2,2) float32, cosine and sine of each pair's angle.
        eps: of the norm.
    """
    if torch.compiler.is_compiling():
        wide = _wide(x)
        return _rotated_real(wide * rms_factor(wide, eps) * weight, rope).to(x.dtype)
    return _NormaliseAndRotate.apply(x, weight, rope, eps)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """Returns silu(gate) * value, elementwise."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * value
    return _SwiGLU.apply(gate, value)


def rms_factor(x: Tensor, eps: float) -> Tensor:
    """Returns 1 / sqrt(mean(x^2) + eps) over the last axis, which stays with size 1."""
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _wide(x: Tensor) -> Tensor:
    """Returns ``x`` in the precision that is computed in: float32, or float64 where it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _factor_of(wide: Tensor, eps: float) -> Tensor:
    # One pass over the rows and no temporary of their size.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Returns the gradient of what was broadcast from ``shape``."""
    return gradient.sum_to_size(shape)


def _norm_gradient(gradient: Tensor, normed: Tensor, factor: Tensor) -> Tensor:
    """Returns the gradient of x, float32; writes over ``gradient``.

    Args:
        gradient: of x / rms, float32.
        normed: x / rms.
        factor: 1 / rms.
    """
    along = torch.linalg.vecdot(gradient, normed).div_(normed.shape[-1]).unsqueeze(-1)
    return gradient.addcmul_(normed, along, value=-1).mul_(factor)


class _ScaledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        wide = _wide(x)
        rms = _factor_of(wide, eps)
        ctx.save_for_backward(x, factor, rms)
        normed = (wide * rms).mul_(factor)
        return (normed if residual is None else normed.add_(residual)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, rms = ctx.saved_tensors
        of_x, of_factor = None, None
        wide = _wide(gradients[0])
        normed = _wide(x) * rms
        if ctx.needs_input_grad[1]:
            of_factor = _sum_to(wide * normed, factor.shape)
        if ctx.needs_input_grad[0]:
            of_x = _norm_gradient(wide * factor, normed, rms).to(x.dtype)
        return of_x, of_factor, None, gradients[0] if ctx.needs_input_grad[3] else None


class _NormaliseAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rope: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        rms = _factor_of(wide, eps)
        ctx.save_for_backward(x, weight, rope, rms)
        return _rotated((wide * rms).mul_(weight), rope).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rope, rms = ctx.saved_tensors
        of_x, of_weight = None, None
        turned_back = _rotated(_wide(gradients[0]), rope, back=True)
        normed = _wide(x) * rms
        if ctx.needs_input_grad[1]:
            of_weight = _sum_to(turned_back * normed, weight.shape).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            of_x = _norm_gradient(turned_back.mul_(weight), normed, rms).to(x.dtype)
        return of_x, of_weight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        (gradient,) = gradients
        product = gradient * value
        of_gate = torch.ops.aten.silu_backward(product, gate)
        return of_gate, torch.ops.aten.silu.out(gate, out=product).mul_(gradient)  # these are the widest tensors of all


def _rotated_real(x: Tensor, rope: Tensor) -> Tensor:
    """Returns each pair of ``x`` turned; single operations, which a compiler fuses."""
    cosine, sine = rope.unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


def _rotated(x: Tensor, rope: Tensor, back: bool = False) -> Tensor:
    """Returns each pair of ``x`` turned, or turned back: one product of complex numbers, in place where possible."""
    turn = torch.view_as_complex(rope.to(x.dtype))
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * (turn.conj() if back else turn)).flatten(-2)
