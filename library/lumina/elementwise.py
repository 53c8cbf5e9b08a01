"""The arithmetic between a block's matrix products: norms, modulation, gates, SwiGLU and rotation, fused by hand.

Written out as single operations, these steps make autograd keep each of their results: more than the matrix products
need. Here each step is one function with a gradient of its own, which keeps only its inputs (they are kept anyway) and a
factor a row (Triton kernels not even that), and computes the rest again. Norms and rotation are float32 arithmetic with
one rounding at the end, whatever the inputs are (torch's operations for halves on GPUs round a norm once more on its way);
SwiGLU rounds twice in bf16, once behind silu, as the reference program does.

On a GPU these steps take as long as they move bytes. There, halves go through Triton kernels (``elementwise_launches``) that
read each input once and write each result once, where Triton can compile (``elementwise_trial``). Where it cannot, as on
Windows without its package, they go through torch's fused norm and through operations that read halves, compute in float32
and write halves: torch converts in the registers of such a kernel, where on a CPU it would make the float32 copies after
all. Bytes of traffic an element of the result, in halves; 1 or 2 more where kernels add up the gradient of a norm's factor:

    ==================== =================  =================  ===========================
    step                 kernels            torch's operations with float32 intermediates
    ==================== =================  =================  ===========================
    norm                 4, backward 6      8, backward 10     32, backward 70
    norm and residual    6, backward 6      10, backward 10    42, backward 70
    norm and rotation    4, backward 6      22, backward 44    40, backward 78
    SwiGLU               6, backward 10     10, backward 22    (no float32 in either)
    values               0, backward 4      0, backward 4      0, backward 4
    ==================== =================  =================  ===========================

Under ``torch.compile`` the same formulas are left to the compiler, which fuses further and chooses itself what to keep.

Shapes: B batch, S tokens, D width, A heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.lumina.elementwise_trial import HALVES, kernels_on

__all__ = ["queries_keys_values", "rms_factor", "scaled_norm", "swiglu"]

_fused_rms_norm, _fused_rms_norm_backward = torch.ops.aten._fused_rms_norm, torch.ops.aten._fused_rms_norm_backward


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
    kernels = _kernels_for(x)
    return _applied(kernels.ScaledNorm if kernels else _ScaledNorm, x, factor, eps, residual)


def queries_keys_values(
    qkv: Tensor, num_heads: int, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries (B,S,A,E), keys (B,S,K,E) and values (B,S,K,E) for attention, all in ``qkv``'s dtype.

    Heads of queries and keys are normalised, weighted, and each pair of neighbouring channels turned. Values are as they
    were, a view of ``qkv``. Backward writes all three gradients into one tensor, so that none has to be put together.

    Args:
        qkv: (B,S,A+2K,E).
        num_heads: A.
        q_weight: (E,) of the queries' norm.
        k_weight: (E,) of the keys' norm.
        rope: (B or 1,S,1,E/2,2) float32, cosine and sine of each pair's angle.
        eps: of both norms.
    """
    if torch.compiler.is_compiling():
        *turned, v = _parts(qkv, num_heads)
        wide = [_wide(x) for x in turned]
        normed = [x * rms_factor(x, eps) * weight for x, weight in zip(wide, (q_weight, k_weight), strict=True)]
        q, k = (_rotated_real(x, rope).to(qkv.dtype) for x in normed)
        return q, k, v
    kernels = _kernels_for(qkv)
    function = kernels.QueriesKeysValues if kernels else _QueriesKeysValues
    return _applied(function, qkv, num_heads, q_weight, k_weight, rope, eps)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """Returns silu(gate) * value, elementwise."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * value
    kernels = _kernels_for(gate)
    return _applied(kernels.SwiGLU if kernels else _SwiGLU, gate, value)


def rms_factor(x: Tensor, eps: float) -> Tensor:
    """Returns 1 / sqrt(mean(x^2) + eps) over the last axis, which stays with size 1."""
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class _Unrecorded:
    """What a function's ``forward`` is given for a context where nobody asks for its gradient."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps nothing."""


def _applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Returns the function's result; without gradients (sampling) the host does not prepare for any."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(_Unrecorded(), *inputs)


def _is_half_on_gpu(x: Tensor) -> bool:
    """Whether what takes longest is to move float32 intermediates."""
    return x.is_cuda and x.dtype in HALVES


def _kernels_for(x: Tensor) -> ModuleType | None:
    """Returns the module of Triton kernels where they can do the work; they want memory, which stand-ins have none of."""
    if x.is_cuda and x.dtype in HALVES and type(x) is Tensor:
        return kernels_on(x.get_device(), x.dtype)
    return None


def _wide(x: Tensor) -> Tensor:
    """Returns ``x`` in the precision that is computed in: float32, or float64 where it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a * b, contiguous and of the shape of ``a``, computed in the widest of all three dtypes."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), dtype)
    return torch.mul(a, b.to(wide), out=torch.empty(a.shape, dtype=dtype, device=a.device))


def _factor_of(x: Tensor, eps: float) -> Tensor:
    # One pass over the rows and no temporary of their size; on a GPU also where it has to be in another precision.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


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
        if _is_half_on_gpu(x):
            normed, rms = _fused_rms_norm(x.contiguous(), [x.shape[-1]], None, eps)
            ctx.save_for_backward(x, factor, rms)
            if residual is None:
                return torch.mul(normed, factor, out=normed)
            return torch.addcmul(residual, normed, factor, out=normed)
        wide = _wide(x)
        rms = _factor_of(wide, eps)
        ctx.save_for_backward(x, factor, rms)
        normed = (wide * rms).mul_(factor)
        return (normed if residual is None else normed.add_(residual)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, rms = ctx.saved_tensors
        (gradient,) = gradients
        of_x, of_factor = None, None
        of_residual = gradient if ctx.needs_input_grad[3] else None
        if _is_half_on_gpu(x):
            if ctx.needs_input_grad[1]:
                of_factor = _sum_to((x * rms).mul_(gradient), factor.shape)
            if ctx.needs_input_grad[0]:
                of_normed = _product(gradient, factor, x.dtype)
                of_x, _ = _fused_rms_norm_backward(of_normed, x.contiguous(), [x.shape[-1]], rms, None, [True, False])
            return of_x, of_factor, None, of_residual
        wide = _wide(gradient)
        normed = _wide(x) * rms
        if ctx.needs_input_grad[1]:
            of_factor = _sum_to(wide * normed, factor.shape)
        if ctx.needs_input_grad[0]:
            of_x = _norm_gradient(wide * factor, normed, rms).to(x.dtype)
        return of_x, of_factor, None, of_residual


class _QueriesKeysValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _parts(qkv, num_heads)
        (q, q_rms), (k, k_rms) = _turned(q, q_weight, rope, eps), _turned(k, k_weight, rope, eps)
        ctx.save_for_backward(qkv, q_weight, k_weight, rope, q_rms, k_rms)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, rope, q_rms, k_rms = ctx.saved_tensors
        of_q, of_k, of_v = gradients
        needs_qkv, _, needs_q_weight, needs_k_weight, *_ = ctx.needs_input_grad
        num_heads = of_q.shape[2]
        q, k, _ = _parts(qkv, num_heads)
        of_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if needs_qkv else None
        into_q, into_k, into_v = (None, None, None) if of_qkv is None else _parts(of_qkv, num_heads)
        of_q_weight = _turned_back(of_q, q, q_weight, rope, q_rms, into_q, needs_q_weight)
        of_k_weight = _turned_back(of_k, k, k_weight, rope, k_rms, into_k, needs_k_weight)
        if into_v is not None:
            into_v.copy_(of_v)
        return of_qkv, None, of_q_weight, of_k_weight, None, None


def _parts(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Returns the views (B,S,A,E), (B,S,K,E), (B,S,K,E) of (B,S,A+2K,E)."""
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    return qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=2)


def _turned(x: Tensor, weight: Tensor, rope: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns heads (B,S,heads,E) normalised, weighted and turned, and 1 / rms of each."""
    if _is_half_on_gpu(x):
        rms = _factor_of(x, eps)
        # A row's factor commutes with its rotation, so it can wait for the operation that rounds.
        return _product(_rotate_(_product(x, weight, rms.dtype), rope), rms, x.dtype), rms
    wide = _wide(x)
    rms = _factor_of(wide, eps)
    return _rotated((wide * rms).mul_(weight), rope).to(x.dtype), rms


def _turned_back(
    gradient: Tensor, x: Tensor, weight: Tensor, rope: Tensor, rms: Tensor, into: Tensor | None, needs_weight: bool
) -> Tensor | None:
    """Writes the gradient of ``_turned``'s ``x`` and returns that of its weight, where they are wanted.

    Args:
        gradient: of the result.
        x: as it was given.
        weight: as it was given.
        rope: as it was given.
        rms: as it was returned.
        into: of the shape of ``x``; None = not wanted.
        needs_weight: whether the weight's gradient is wanted.
    """
    of_weight = None
    if _is_half_on_gpu(x):
        turned_back = _rotate_(_product(gradient, rms, rms.dtype), rope, back=True)  # of x * weight
        if needs_weight:
            of_weight = _sum_to(turned_back * x, weight.shape).to(weight.dtype)
        if into is not None:
            of_row = turned_back.mul_(weight)
            along = (of_row * x).mean(dim=-1, keepdim=True).mul_(rms).mul_(rms)
            torch.addcmul(of_row, x, along, value=-1, out=into)
        return of_weight
    turned_back = _rotated(_wide(gradient), rope, back=True)
    normed = _wide(x) * rms
    if needs_weight:
        of_weight = _sum_to(turned_back * normed, weight.shape).to(weight.dtype)
    if into is not None:
        into.copy_(_norm_gradient(turned_back.mul_(weight), normed, rms))
    return of_weight


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
    """Returns each pair of ``x`` turned, or turned back: one product of complex numbers."""
    turn = torch.view_as_complex(rope.to(x.dtype))
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * (turn.conj() if back else turn)).flatten(-2)


def _rotate_(x: Tensor, rope: Tensor, back: bool = False) -> Tensor:
    """Turns each pair of ``x`` (float32, contiguous), or turns it back, in place."""
    turn = torch.view_as_complex(rope)
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn.conj() if back else turn)
    return x
