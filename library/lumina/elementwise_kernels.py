"""Norms, rotation and SwiGLU as Triton kernels: for halves on GPUs, where Triton can compile.

Importing this needs the package triton. Who may be given a tensor is decided in ``elementwise_trial``; the contracts of the
functions stand in ``elementwise``.

One launch each way (and a sum where a norm's factor is trained). A kernel reads an input once, computes in float32 in
registers, and writes each result once. What autograd keeps are inputs alone: a backward kernel has the row in its
registers anyway, and takes its mean square again.

Rounding: a norm's and a rotation's results and gradients are float32 arithmetic with one rounding at the end. SwiGLU
rounds where the plain function does: silu's result and, backward, the product that goes into silu's gradient, to the half.
The gradient of a norm's factor is a float32 sum in a fixed order, so that two runs are equal to the bit.

Launching is most of what these steps cost the host, so the path to it is short: no shapes are tuned, numbers that a model
fixes are constants of the compiled code, and what varies (tokens, batch) is the grid, so that a run compiles each kernel
once for each width. Offsets of rows are 64 bits wide: a batch may hold more than 2^31 numbers.

Shapes: B batch, S tokens, D width, E head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from library.kernel_trial import on_device_of

__all__ = ["NormaliseAndRotate", "ScaledNorm", "SwiGLU"]

_HEADS_AT_ONCE = 8  # heads of a token that one pass of a program turns
_SWIGLU_BLOCK = 2048
_FEW_TOKENS = 8192  # of a batch: so few that programs of more rows would leave a large GPU idle
_ROWS = (4, 8)  # whose part of a factor's gradient one program adds up: of few tokens, of more


# ---- kernels ----


@triton.jit
def _norm_forward(
    x: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    factor_stride: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    """out = residual + x / rms * factor; grid (S,B), a row a program.

    A row of a width that is no power of two is taken as two pieces: padding it to the next one would cost registers.
    """
    sample = tl.program_id(1)
    row = (sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D
    factor += sample * factor_stride
    head = tl.arange(0, HEAD)
    x_head = tl.load(x + row + head).to(tl.float32)
    squares = tl.sum(x_head * x_head, 0)
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        inside = tail < D
        x_tail = tl.load(x + row + tail, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(x_tail * x_tail, 0)
    rms = tl.rsqrt(squares / D + eps)
    y_head = x_head * rms * tl.load(factor + head).to(tl.float32)
    if ADDS:
        y_head += tl.load(residual + row + head).to(tl.float32)
    tl.store(out + row + head, y_head.to(out.dtype.element_ty))
    if TAIL:
        y_tail = x_tail * rms * tl.load(factor + tail, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            y_tail += tl.load(residual + row + tail, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row + tail, y_tail.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _norm_backward(
    x: tl.tensor,
    factor: tl.tensor,
    gradient: tl.tensor,
    of_x: tl.tensor,
    of_factor: tl.tensor,
    tokens: tl.tensor,
    factor_stride: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """of_x, and of_factor (B,groups,D): its sums over ROWS tokens each; grid (groups,B)."""
    group, sample = tl.program_id(0), tl.program_id(1)
    first_row = sample.to(tl.int64) * tokens
    factor += sample * factor_stride
    head = tl.arange(0, HEAD)
    factor_head = tl.load(factor + head).to(tl.float32)
    sum_head = tl.zeros([HEAD], tl.float32)
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        inside = tail < D
        factor_tail = tl.load(factor + tail, mask=inside, other=0.0).to(tl.float32)
        sum_tail = tl.zeros([TAIL], tl.float32)
    for step in tl.range(ROWS, num_stages=2):  # the next row is on its way meanwhile
        token = group * ROWS + step
        row = (first_row + token) * D
        there = (token < tokens) & (head < D)  # what lies behind the last row counts as 0
        x_head = tl.load(x + row + head, mask=there, other=0.0).to(tl.float32)
        g_head = tl.load(gradient + row + head, mask=there, other=0.0).to(tl.float32)
        squares = tl.sum(x_head * x_head, 0)
        along = tl.sum(g_head * factor_head * x_head, 0)
        if TAIL:
            tail_there = (token < tokens) & inside
            x_tail = tl.load(x + row + tail, mask=tail_there, other=0.0).to(tl.float32)
            g_tail = tl.load(gradient + row + tail, mask=tail_there, other=0.0).to(tl.float32)
            squares += tl.sum(x_tail * x_tail, 0)
            along += tl.sum(g_tail * factor_tail * x_tail, 0)
        rms = tl.rsqrt(squares / D + eps)
        along *= rms * rms / D
        of_head = (g_head * factor_head - x_head * along) * rms
        tl.store(of_x + row + head, of_head.to(of_x.dtype.element_ty), mask=there)
        if SUMS:
            sum_head += g_head * (x_head * rms)
        if TAIL:
            of_tail = (g_tail * factor_tail - x_tail * along) * rms
            tl.store(of_x + row + tail, of_tail.to(of_x.dtype.element_ty), mask=tail_there)
            if SUMS:
                sum_tail += g_tail * (x_tail * rms)
    if SUMS:
        of_factor += (sample * tl.num_programs(0) + group).to(tl.int64) * D
        tl.store(of_factor + head, sum_head)
        if TAIL:
            tl.store(of_factor + tail, sum_tail, mask=inside)


@triton.jit
def _rotate_forward(
    x: tl.tensor,
    weight: tl.tensor,
    rope: tl.tensor,
    out: tl.tensor,
    sample_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    rope_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Heads normalised, weighted and turned; grid (S,B), all heads of a token a program, NUM of them at once."""
    token, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDE)
    inside = channel < E
    turn = tl.load(rope + sample * rope_stride + token * E + channel, mask=inside, other=0.0)
    cosine, sine = tl.split(tl.reshape(turn, [1, WIDE // 2, 2]))
    weights = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    x += sample * sample_stride + token.to(tl.int64) * token_stride
    out += (sample * tl.num_programs(0) + token) * (HEADS * E)
    for first in tl.static_range(0, HEADS, NUM):
        head = first + tl.arange(0, NUM)[:, None]
        there = (head < HEADS) & inside[None, :]
        x_wide = tl.load(x + head * head_stride + channel[None, :], mask=there, other=0.0).to(tl.float32)
        rms = tl.rsqrt(tl.sum(x_wide * x_wide, 1) / E + eps)
        even, odd = tl.split(tl.reshape(x_wide * rms[:, None] * weights, [NUM, WIDE // 2, 2]))
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        turned = tl.reshape(turned, [NUM, WIDE]).to(out.dtype.element_ty)
        tl.store(out + head * E + channel[None, :], turned, mask=there)


@triton.jit
def _rotate_backward(
    x: tl.tensor,
    weight: tl.tensor,
    rope: tl.tensor,
    gradient: tl.tensor,
    of_x: tl.tensor,
    sample_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    rope_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """of_x (B,S,heads,E) contiguous; the strides are those of x, and the gradient is contiguous; grid (S,B)."""
    token, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDE)
    inside = channel < E
    turn = tl.load(rope + sample * rope_stride + token * E + channel, mask=inside, other=0.0)
    cosine, sine = tl.split(tl.reshape(turn, [1, WIDE // 2, 2]))
    weights = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    x += sample * sample_stride + token.to(tl.int64) * token_stride
    row = (sample * tl.num_programs(0) + token) * (HEADS * E)
    for first in tl.static_range(0, HEADS, NUM):
        head = first + tl.arange(0, NUM)[:, None]
        there = (head < HEADS) & inside[None, :]
        index = head * E + channel[None, :]
        x_wide = tl.load(x + head * head_stride + channel[None, :], mask=there, other=0.0).to(tl.float32)
        g_wide = tl.load(gradient + row + index, mask=there, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(g_wide, [NUM, WIDE // 2, 2]))
        back = tl.join(even * cosine + odd * sine, odd * cosine - even * sine)
        back = tl.reshape(back, [NUM, WIDE]) * weights  # of x / rms
        rms = tl.rsqrt(tl.sum(x_wide * x_wide, 1) / E + eps)
        along = tl.sum(back * x_wide, 1) * (rms * rms / E)
        result = (back - x_wide * along[:, None]) * rms[:, None]
        tl.store(of_x + row + index, result.to(of_x.dtype.element_ty), mask=there)


@triton.jit
def _swiglu_forward(gate: tl.tensor, value: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """out = silu(gate) * value; a block of numbers a program."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    there = lane < count - start
    half = out.dtype.element_ty
    g = tl.load(gate + start + lane, mask=there, other=0.0).to(tl.float32)
    v = tl.load(value + start + lane, mask=there, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(half).to(tl.float32)
    tl.store(out + start + lane, (silu * v).to(half), mask=there)


@triton.jit
def _swiglu_backward(
    gate: tl.tensor,
    value: tl.tensor,
    gradient: tl.tensor,
    of_gate: tl.tensor,
    of_value: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Both gradients; a block of numbers a program."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    there = lane < count - start
    half = of_gate.dtype.element_ty
    g = tl.load(gate + start + lane, mask=there, other=0.0).to(tl.float32)
    v = tl.load(value + start + lane, mask=there, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + start + lane, mask=there, other=0.0).to(tl.float32)
    logistic = 1.0 / (1.0 + tl.exp(-g))
    of_silu = (upstream * v).to(half).to(tl.float32)
    tl.store(of_gate + start + lane, (of_silu * logistic * (1.0 + g * (1.0 - logistic))).to(half), mask=there)
    silu = (g * logistic).to(half).to(tl.float32)
    tl.store(of_value + start + lane, (silu * upstream).to(half), mask=there)


# ---- launches ----


def _pieces(width: int) -> tuple[int, int, int]:
    """Returns the two powers of two that a row is taken in (the second may be 0), and the number of warps for it."""
    head = 1 << (width.bit_length() - 1)
    tail = triton.next_power_of_2(width - head) if width > head else 0
    return head, tail, min(max(head // 512, 1), 8)


def _tile(heads: int, head_dim: int) -> tuple[int, int]:
    """Returns the powers of two of heads and channels that are turned at once."""
    return min(triton.next_power_of_2(heads), _HEADS_AT_ONCE), triton.next_power_of_2(head_dim)


def _stride_of_samples(x: Tensor, numbers: int) -> int:
    """Returns how far a sample's rows are from the next sample's, where each has ``numbers``: 0 for what all share."""
    return numbers if x.numel() > numbers else 0


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
        head, tail, warps = _pieces(width)
        stride = _stride_of_samples(factor, width)
        with on_device_of(x):
            _norm_forward[(tokens, batch)](
                x, factor, added, out, stride, eps, width, head, tail, residual is not None, num_warps=warps
            )
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
        x, scale, contiguous = x.contiguous(), factor.contiguous(), gradient.contiguous()
        of_x = torch.empty_like(x)
        rows = _ROWS[batch * tokens > _FEW_TOKENS] if sums else 1
        groups = -(-tokens // rows)
        partial = torch.empty((batch, groups, width), dtype=torch.float32, device=x.device) if sums else of_x
        head, tail, warps = _pieces(width)
        stride = _stride_of_samples(factor, width)
        with on_device_of(x):
            _norm_backward[(groups, batch)](
                x,
                scale,
                contiguous,
                of_x,
                partial,
                tokens,
                stride,
                ctx.eps,
                width,
                head,
                tail,
                rows,
                sums,
                num_warps=warps,
            )
        of_factor = partial.sum_to_size(factor.shape).to(factor.dtype) if sums else None
        return of_x if ctx.needs_input_grad[0] else None, of_factor, None, of_residual


class NormaliseAndRotate(torch.autograd.Function):
    """See :func:`library.lumina.elementwise.normalise_and_rotate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rope: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, rope)
        ctx.eps = eps
        batch, tokens, heads, channels = x.shape
        x, rope = _with_whole_heads(x), rope.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rope_stride = _stride_of_samples(rope, tokens * channels)
        with on_device_of(x):
            _rotate_forward[(tokens, batch)](
                x,
                weight,
                rope,
                out,
                *x.stride()[:3],
                rope_stride,
                eps,
                heads,
                channels,
                *_tile(heads, channels),
                num_warps=4,
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rope = ctx.saved_tensors
        of_x, of_weight = None, None
        if ctx.needs_input_grad[1]:  # is frozen as a rule
            of_weight = _gradient_of_weight(x, weight, rope, gradient, ctx.eps)
        if ctx.needs_input_grad[0]:
            batch, tokens, heads, channels = x.shape
            x, rope, gradient = _with_whole_heads(x), rope.contiguous(), gradient.contiguous()
            of_x = torch.empty_like(gradient)
            strides = (*x.stride()[:3], _stride_of_samples(rope, tokens * channels))
            tile = _tile(heads, channels)
            with on_device_of(x):
                _rotate_backward[(tokens, batch)](
                    x, weight, rope, gradient, of_x, *strides, ctx.eps, heads, channels, *tile, num_warps=4
                )
        return of_x, of_weight, None, None


def _with_whole_heads(x: Tensor) -> Tensor:
    """Returns ``x`` with the channels of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
        count = gate.numel()
        with on_device_of(gate):
            _swiglu_forward[(-(-count // _SWIGLU_BLOCK),)](gate, value, out, count, _SWIGLU_BLOCK, num_warps=8)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = (saved.contiguous() for saved in ctx.saved_tensors)
        gradient = gradient.contiguous()
        of_gate, of_value = torch.empty_like(gate), torch.empty_like(gate)
        count = gate.numel()
        with on_device_of(gate):
            _swiglu_backward[(-(-count // _SWIGLU_BLOCK),)](
                gate, value, gradient, of_gate, of_value, count, _SWIGLU_BLOCK, num_warps=8
            )
        return of_gate, of_value
