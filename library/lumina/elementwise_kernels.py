"""Norms, rotation and SwiGLU as Triton kernels: for halves on GPUs, where Triton can compile.

Importing this needs the package triton. What launches them, with gradients, are the functions of ``elementwise_launches``.

A kernel reads an input once, computes in float32 in registers, and writes each result once. A backward kernel has the row
in its registers anyway, and takes its mean square again.

What takes time is memory, so all of a program's reads are under way before the first sum or write, which a read behind it
would have to wait for. A row is a tuple of pieces, of 8 numbers (16 bytes of halves) a lane, not padded to the next power of
two. One warp takes a whole row, so that warps need not wait for each other; where float32 sums are held as well, two do,
with 4 numbers a lane.
What a compiler makes of it is printed by ``tests/bench/kernel_resources.py``.

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


# ---- norms ----


@triton.jit
def _read_row(row: tl.tensor, there: tl.tensor, D: tl.constexpr, PIECE: tl.constexpr) -> tl.tuple:
    """Returns a row's numbers, or zeros if it is not ``there``: tensors of PIECE, zeros behind the end of the last one."""
    pieces: tl.tuple = ()
    for first in tl.static_range(0, D, PIECE):
        at = first + tl.arange(0, PIECE)
        pieces += (tl.load(row + at, mask=(at < D) & there, other=0.0).to(tl.float32),)
    return pieces


@triton.jit
def _write_row(row: tl.tensor, there: tl.tensor, pieces: tl.tuple, D: tl.constexpr, PIECE: tl.constexpr) -> None:
    for piece in tl.static_range(len(pieces)):
        at = piece * PIECE + tl.arange(0, PIECE)
        tl.store(row + at, pieces[piece].to(row.dtype.element_ty), mask=(at < D) & there)


@triton.jit
def _product_sum(a: tl.tuple, b: tl.tuple) -> tl.tensor:
    products = a[0] * b[0]
    for piece in tl.static_range(1, len(a)):
        products += a[piece] * b[piece]
    return tl.sum(products, 0)


@triton.jit(do_not_specialize=["own"])
def norm_forward(
    x: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    own: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    """out = residual + x / rms * factor; grid (S,B), a row a program.

    ``own`` is 1 if each sample has its own factor, 0 if all share one.
    """
    sample = tl.program_id(1)
    row = (sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D
    x_row = _read_row(x + row, True, D, PIECE)
    if ADDS:
        added = _read_row(residual + row, True, D, PIECE)
    factors = _read_row(factor + sample * own * D, True, D, PIECE)
    rms = tl.rsqrt(_product_sum(x_row, x_row) / D + eps)
    y_row: tl.tuple = ()
    for piece in tl.static_range(len(x_row)):
        y = x_row[piece] * rms * factors[piece]
        if ADDS:
            y += added[piece]
        y_row += (y,)
    _write_row(out + row, True, y_row, D, PIECE)


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
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """of_x, and of_factor (B,groups,D): its sums over ROWS tokens each; grid (groups,B)."""
    group, sample = tl.program_id(0), tl.program_id(1)
    factor += sample * own * D
    sums: tl.tuple = ()
    if SUMS:
        for _ in tl.static_range(0, D, PIECE):
            sums += (tl.zeros([PIECE], tl.float32),)
    for step in range(ROWS):
        token = group * ROWS + step
        there = token < tokens  # what lies behind the last row counts as 0
        row = (sample.to(tl.int64) * tokens + token) * D
        x_row = _read_row(x + row, there, D, PIECE)
        g_row = _read_row(gradient + row, there, D, PIECE)
        factors = _read_row(factor, True, D, PIECE)
        scaled: tl.tuple = ()
        for piece in tl.static_range(len(x_row)):
            scaled += (g_row[piece] * factors[piece],)
        rms = tl.rsqrt(_product_sum(x_row, x_row) / D + eps)
        along = _product_sum(scaled, x_row) * (rms * rms / D)
        of_row: tl.tuple = ()
        new_sums: tl.tuple = ()
        for piece in tl.static_range(len(x_row)):
            of_row += ((scaled[piece] - x_row[piece] * along) * rms,)
            if SUMS:
                new_sums += (sums[piece] + g_row[piece] * (x_row[piece] * rms),)
        sums = new_sums
        _write_row(of_x + row, there, of_row, D, PIECE)
    if SUMS:
        of_group = of_factor + (sample * tl.num_programs(0) + group).to(tl.int64) * D
        _write_row(of_group, True, sums, D, PIECE)


# ---- rotation ----


@triton.jit
def _place(tile: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr, NUM: tl.constexpr, WIDE: tl.constexpr) -> tl.tuple:
    """Returns where the numbers of a token's tile (NUM,WIDE) of heads lie, and which of them there are."""
    head, channel = tile * NUM + tl.arange(0, NUM)[:, None], tl.arange(0, WIDE)[None, :]
    return head * E + channel, (head < HEADS) & (channel < E)


@triton.jit
def _read_heads(x: tl.tensor, HEADS: tl.constexpr, E: tl.constexpr, NUM: tl.constexpr, WIDE: tl.constexpr) -> tl.tuple:
    """Returns a token's heads, NUM in a tile."""
    tiles: tl.tuple = ()
    for tile in tl.static_range((HEADS + NUM - 1) // NUM):
        index, there = _place(tile, HEADS, E, NUM, WIDE)
        tiles += (tl.load(x + index, mask=there, other=0.0),)
    return tiles


@triton.jit
def _read_for_heads(x: tl.tensor, E: tl.constexpr, NUM: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Returns a tile of the same E numbers for each head, so that every lane reads what its own channels need."""
    channel = tl.broadcast_to(tl.arange(0, WIDE)[None, :], [NUM, WIDE])
    return tl.load(x + channel, mask=channel < E, other=0.0).to(tl.float32)


@triton.jit
def _in_pairs(tile: tl.tensor, NUM: tl.constexpr, WIDE: tl.constexpr) -> tl.tuple:
    return tl.split(tl.reshape(tile, [NUM, WIDE // 2, 2]))


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
    """Heads of queries and keys normalised, weighted and turned; grid (S,B), a token a program.

    ``own`` is 1 if each sample has its own angles, 0 if all share them.
    """
    token, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = sample * tl.num_programs(0) + token
    qkv += row * ((A + 2 * K) * E)
    of_q = _read_heads(qkv, A, E, NUM, WIDE)
    of_k = _read_heads(qkv + A * E, K, E, NUM, WIDE)
    angles = _read_for_heads(rope + (sample * own * tl.num_programs(0) + token) * E, E, NUM, WIDE)
    weights_q = _read_for_heads(weight_q, E, NUM, WIDE)
    weights_k = _read_for_heads(weight_k, E, NUM, WIDE)
    _turn_heads(of_q, weights_q, angles, q + row * (A * E), eps, A, E, NUM, WIDE)
    _turn_heads(of_k, weights_k, angles, k + row * (K * E), eps, K, E, NUM, WIDE)


@triton.jit
def _turn_heads(
    tiles: tl.tuple,
    weights: tl.tensor,
    angles: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Writes some heads of one token, behind the pointer ``out``."""
    cosine, sine = _in_pairs(angles, NUM, WIDE)
    for tile in tl.static_range(len(tiles)):
        x = tiles[tile].to(tl.float32)
        rms = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / E + eps)
        even, odd = _in_pairs(x * rms * weights, NUM, WIDE)
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        index, there = _place(tile, HEADS, E, NUM, WIDE)
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
    qkv += row * ((A + 2 * K) * E)
    of_qkv += row * ((A + 2 * K) * E)
    q = _read_heads(qkv, A, E, NUM, WIDE)
    gradients_q = _read_heads(of_q + row * (A * E), A, E, NUM, WIDE)
    k = _read_heads(qkv + A * E, K, E, NUM, WIDE)
    gradients_k = _read_heads(of_k + row * (K * E), K, E, NUM, WIDE)
    gradients_v = _read_heads(of_v + row * (K * E), K, E, NUM, WIDE)
    angles = _read_for_heads(rope + (sample * own * tl.num_programs(0) + token) * E, E, NUM, WIDE)
    weights_q = _read_for_heads(weight_q, E, NUM, WIDE)
    weights_k = _read_for_heads(weight_k, E, NUM, WIDE)
    _turn_heads_back(q, gradients_q, weights_q, angles, of_qkv, eps, A, E, NUM, WIDE)
    _turn_heads_back(k, gradients_k, weights_k, angles, of_qkv + A * E, eps, K, E, NUM, WIDE)
    for tile in tl.static_range(len(gradients_v)):
        index, there = _place(tile, K, E, NUM, WIDE)
        tl.store(of_qkv + (A + K) * E + index, gradients_v[tile], mask=there)


@triton.jit
def _turn_heads_back(
    tiles: tl.tuple,
    gradients: tl.tuple,
    weights: tl.tensor,
    angles: tl.tensor,
    of_x: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    NUM: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Writes the gradient of some heads of one token, behind the pointer ``of_x``."""
    cosine, sine = _in_pairs(angles, NUM, WIDE)
    for tile in tl.static_range(len(tiles)):
        x = tiles[tile].to(tl.float32)
        even, odd = _in_pairs(gradients[tile].to(tl.float32), NUM, WIDE)
        back = tl.join(even * cosine + odd * sine, odd * cosine - even * sine)
        back = tl.reshape(back, [NUM, WIDE]) * weights  # of x / rms
        rms = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / E + eps)
        along = tl.sum(back * x, 1, keep_dims=True) * (rms * rms / E)
        index, there = _place(tile, HEADS, E, NUM, WIDE)
        tl.store(of_x + index, ((back - x * along) * rms).to(of_x.dtype.element_ty), mask=there)


# ---- SwiGLU ----


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
