"""Norms, rotation and SwiGLU as Triton kernels: for halves on GPUs, where Triton can compile.

Importing this needs the package triton. What launches them, with gradients, are the functions of ``elementwise_launches``.

A kernel reads an input once, computes in float32 in registers, and writes each result once. A backward kernel has the row
in its registers anyway, and takes its mean square again.

Rounding: a norm's and a rotation's results and gradients are float32 arithmetic with one rounding at the end. SwiGLU
rounds where the plain function does: silu's result and, backward, the product that goes into silu's gradient, to the half.
The gradient of a norm's factor is a float32 sum in a fixed order, so that two runs are equal to the bit.

Numbers that a model fixes are constants of the compiled code, no shapes are tuned, and what varies (tokens, batch) is the
grid, so that a run compiles each kernel once for each width. Offsets of rows are 64 bits wide: a batch may hold more than
2^31 numbers.

Arguments come in the order that ``kernel_launch`` wants: tensors, numbers, constants. Tensors are contiguous.

Shapes: B batch, S tokens, D width, A heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["norm_backward", "norm_forward", "rotate_backward", "rotate_forward", "swiglu_backward", "swiglu_forward"]


@triton.jit(do_not_specialize=["own"])
def norm_forward(
    x: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    own: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    """out = residual + x / rms * factor; grid (S,B), a row a program.

    ``own`` is 1 if each sample has its own factor, 0 if all share one.

    A row of a width that is no power of two is taken as two pieces: padding it to the next one would cost registers.
    """
    sample = tl.program_id(1)
    row = (sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D
    factor += sample * own * D
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


@triton.jit(do_not_specialize=["tokens", "own"])
def norm_backward(
    x: tl.tensor,
    factor: tl.tensor,
    gradient: tl.tensor,
    of_x: tl.tensor,
    of_factor: tl.tensor,
    tokens: tl.tensor,
    own: tl.tensor,
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
    factor += sample * own * D
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


@triton.jit(do_not_specialize=["own"])
def rotate_forward(
    qkv: tl.tensor,
    weight_q: tl.tensor,
    weight_k: tl.tensor,
    rope: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    own: tl.tensor,
    eps: tl.tensor,
    A: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Heads of queries and keys normalised, weighted and turned; grid (S,B), a token a program, NUM heads at once.

    ``own`` is 1 if each sample has its own angles, 0 if all share them.
    """
    token, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = sample * tl.num_programs(0) + token
    rope += (sample * own * tl.num_programs(0) + token) * E
    qkv += row * ((A + 2 * K) * E)
    _turn_heads(qkv, weight_q, rope, q + row * (A * E), eps, A, E, NUM, WIDE)
    _turn_heads(qkv + A * E, weight_k, rope, k + row * (K * E), eps, K, E, NUM, WIDE)


@triton.jit
def _turn_heads(
    x: tl.tensor,
    weight: tl.tensor,
    rope: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Writes some heads of one token; the pointers are to the first of these, and to the token's angles."""
    channel = tl.arange(0, WIDE)
    inside = channel < E
    cosine, sine = tl.split(tl.reshape(tl.load(rope + channel, mask=inside, other=0.0), [1, WIDE // 2, 2]))
    weights = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for first in tl.static_range(0, HEADS, NUM):
        head = first + tl.arange(0, NUM)[:, None]
        there = (head < HEADS) & inside[None, :]
        index = head * E + channel[None, :]
        x_wide = tl.load(x + index, mask=there, other=0.0).to(tl.float32)
        rms = tl.rsqrt(tl.sum(x_wide * x_wide, 1) / E + eps)
        even, odd = tl.split(tl.reshape(x_wide * rms[:, None] * weights, [NUM, WIDE // 2, 2]))
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        tl.store(out + index, tl.reshape(turned, [NUM, WIDE]).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["own"])
def rotate_backward(
    qkv: tl.tensor,
    weight_q: tl.tensor,
    weight_k: tl.tensor,
    rope: tl.tensor,
    of_q: tl.tensor,
    of_k: tl.tensor,
    of_v: tl.tensor,
    of_qkv: tl.tensor,
    own: tl.tensor,
    eps: tl.tensor,
    A: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """of_qkv; its last K heads are a copy of those of_v; grid (S,B)."""
    token, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = sample * tl.num_programs(0) + token
    rope += (sample * own * tl.num_programs(0) + token) * E
    qkv += row * ((A + 2 * K) * E)
    of_qkv += row * ((A + 2 * K) * E)
    of_k += row * (K * E)
    of_v += row * (K * E)
    _turn_heads_back(qkv, weight_q, rope, of_q + row * (A * E), of_qkv, eps, A, E, NUM, WIDE)
    _turn_heads_back(qkv + A * E, weight_k, rope, of_k, of_qkv + A * E, eps, K, E, NUM, WIDE)
    channel = tl.arange(0, WIDE)[None, :]
    for first in tl.static_range(0, K, NUM):
        head = first + tl.arange(0, NUM)[:, None]
        there = (head < K) & (channel < E)
        index = head * E + channel
        tl.store(of_qkv + (A + K) * E + index, tl.load(of_v + index, mask=there), mask=there)


@triton.jit
def _turn_heads_back(
    x: tl.tensor,
    weight: tl.tensor,
    rope: tl.tensor,
    gradient: tl.tensor,
    of_x: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Writes the gradient of some heads of one token; see ``_turn_heads``."""
    channel = tl.arange(0, WIDE)
    inside = channel < E
    cosine, sine = tl.split(tl.reshape(tl.load(rope + channel, mask=inside, other=0.0), [1, WIDE // 2, 2]))
    weights = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for first in tl.static_range(0, HEADS, NUM):
        head = first + tl.arange(0, NUM)[:, None]
        there = (head < HEADS) & inside[None, :]
        index = head * E + channel[None, :]
        x_wide = tl.load(x + index, mask=there, other=0.0).to(tl.float32)
        g_wide = tl.load(gradient + index, mask=there, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(g_wide, [NUM, WIDE // 2, 2]))
        back = tl.join(even * cosine + odd * sine, odd * cosine - even * sine)
        back = tl.reshape(back, [NUM, WIDE]) * weights  # of x / rms
        rms = tl.rsqrt(tl.sum(x_wide * x_wide, 1) / E + eps)
        along = tl.sum(back * x_wide, 1) * (rms * rms / E)
        result = (back - x_wide * along[:, None]) * rms[:, None]
        tl.store(of_x + index, result.to(of_x.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["units"])
def swiglu_forward(
    gate: tl.tensor, value: tl.tensor, out: tl.tensor, units: tl.tensor, UNIT: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """out = silu(gate) * value; a block of numbers a program.

    There are units * UNIT numbers: of a multiple of 16 the compiler must know it, or it moves each number by itself.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    there = lane < units.to(tl.int64) * UNIT - start
    half = out.dtype.element_ty
    g = tl.load(gate + start + lane, mask=there, other=0.0).to(tl.float32)
    v = tl.load(value + start + lane, mask=there, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(half).to(tl.float32)
    tl.store(out + start + lane, (silu * v).to(half), mask=there)


@triton.jit(do_not_specialize=["units"])
def swiglu_backward(
    gate: tl.tensor,
    value: tl.tensor,
    gradient: tl.tensor,
    of_gate: tl.tensor,
    of_value: tl.tensor,
    units: tl.tensor,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Both gradients; a block of numbers a program."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    there = lane < units.to(tl.int64) * UNIT - start
    half = of_gate.dtype.element_ty
    g = tl.load(gate + start + lane, mask=there, other=0.0).to(tl.float32)
    v = tl.load(value + start + lane, mask=there, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + start + lane, mask=there, other=0.0).to(tl.float32)
    logistic = 1.0 / (1.0 + tl.exp(-g))
    of_silu = (upstream * v).to(half).to(tl.float32)
    tl.store(of_gate + start + lane, (of_silu * logistic * (1.0 + g * (1.0 - logistic))).to(half), mask=there)
    silu = (g * logistic).to(half).to(tl.float32)
    tl.store(of_value + start + lane, (silu * upstream).to(half), mask=there)
