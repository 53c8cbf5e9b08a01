"""Quantising and transposing for products in fp8 as Triton kernels: for NVIDIA's GPUs that know e4m3.

Importing this needs the package triton. Who may be given a tensor is decided in ``fp8``, after ``fp8_trial`` has tried it.

One launch for each function; an input is read once and a result is written once. torch's operations would read a matrix of
activations twice and write it once in between, and copy the bytes of a transposed weight one by one.

Results are those of ``fp8`` bit for bit. Where that rounds a product to bfloat16 on its way, it is a product with a power of
two: there is nothing to round (below bfloat16's normal numbers there is, but those are far below the smallest code).

Launching is most of what this costs the host, so nothing is tuned: a matrix has one row a program or tiles of one size.

Shapes: M tokens of all samples, C channels, ``in`` and ``out`` features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from library.kernel_launch import Launcher, pieces

__all__ = ["quantise_rows", "transpose"]

_UNIT = 16  # codes
_TILE = 128  # channels each way; a row of a tile is a whole line of a GPU's cache
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # bits of a float32 without its sign
_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x007FFFFF)
_NAN = tl.constexpr(0x7FC00000)
_ONE_TWICE = tl.constexpr(0x7F000000)  # minus the bits of a power of two: those of its inverse
_SMALLEST_SCALE = tl.constexpr(27 << 23)  # 2^-100
_PART_OF_LARGEST = tl.constexpr(1 / 448)  # times a bfloat16, on the same side of every power of two as divided by 448


# ---- kernels ----


@triton.jit
def _quantise(
    x: tl.tensor,
    factor: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    C: tl.constexpr,
    PIECE: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """codes = x * factor / scale, with a scale for each row; grid (M,), a row a program.

    A row is taken in pieces, all of which are read before the first is waited for, and not padded to a power of two.
    Magnitudes are compared as integers: in the same order, but for NaN, which is above all of them.
    """
    row = tl.program_id(0).to(tl.int64) * C
    # Gradients are read for the last time, and are not to push out the factors, which all rows read.
    HINT: tl.constexpr = "evict_first" if SCALED else ""
    values: tl.tuple = ()
    magnitudes = tl.zeros([PIECE], tl.int32)
    for first in tl.static_range(0, C, PIECE):
        at = first + tl.arange(0, PIECE)
        value = tl.load(x + row + at, mask=at < C, other=0.0, eviction_policy=HINT).to(tl.float32)
        if SCALED:
            value *= tl.load(factor + at, mask=at < C, other=0.0)
        values += (value,)
        magnitudes = tl.maximum(magnitudes, value.to(tl.int32, bitcast=True) & _MAGNITUDE)
    largest = tl.max(magnitudes, 0).to(tl.float32, bitcast=True)
    wanted = (largest * _PART_OF_LARGEST).to(tl.int32, bitcast=True)
    power = (tl.maximum(wanted & _MAGNITUDE, _SMALLEST_SCALE) + _MANTISSA) & _EXPONENT  # of a row with NaN: 0
    tl.store(scale + tl.program_id(0), power.to(tl.float32, bitcast=True))
    # The inverse of infinity is 0; with a scale of 0 all codes become NaN.
    inverse = tl.where(power == 0, _NAN, tl.maximum(_ONE_TWICE - power, 0)).to(tl.float32, bitcast=True)
    for piece in tl.static_range(len(values)):
        at = piece * PIECE + tl.arange(0, PIECE)
        tl.store(codes + row + at, (values[piece] * inverse).to(codes.dtype.element_ty), mask=at < C)


@triton.jit(do_not_specialize=["rows", "columns"])
def _transpose(
    codes: tl.tensor,
    out: tl.tensor,
    ones: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """out (columns,rows) = codes' (rows,columns), ones (columns,) = 1; grid (tiles of columns, tiles of rows).

    Both sides are given in units of UNIT: of a multiple of 16 the compiler must know it, or it moves single bytes.
    """
    rows, columns = rows * UNIT, columns * UNIT
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside_columns, inside_rows = column < columns, row < rows
    here = inside_rows[:, None] & inside_columns[None, :]
    tile = tl.load(codes + row[:, None] * columns + column[None, :], mask=here)
    there = inside_columns[:, None] & inside_rows[None, :]
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=there)
    if tl.program_id(1) == 0:
        tl.store(ones + column, tl.full([TILE], 1.0, tl.float32), mask=inside_columns)


# ---- launches ----

_quantise_launcher, _transpose_launcher = Launcher(_quantise), Launcher(_transpose)


def quantise_rows(matrix: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns matrix * factor as e4m3 codes (M,C), and each row's scale (M,1) float32; see ``fp8.quantise_rows``.

    A row with NaN becomes NaN as a whole, with a scale of 0: what is multiplied with it is NaN in any case.

    Args:
        matrix: (M,C) bfloat16.
        factor: (C,) float32, powers of two; None = 1.
    """
    num_rows, width = matrix.shape
    matrix = matrix.contiguous()
    codes = torch.empty((num_rows, width), dtype=torch.float8_e4m3fn, device=matrix.device)
    scale = torch.empty((num_rows, 1), dtype=torch.float32, device=matrix.device)
    piece, warps = pieces(width)
    tensors = (matrix, scale if factor is None else factor, codes, scale)
    _quantise_launcher((num_rows, 1, 1), tensors, (), (width, piece, factor is not None), warps)
    return codes, scale


def transpose(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes (in,out) of (out,in) ones, contiguous, and scales (1,in) float32 for them: all 1."""
    rows, columns = codes.shape
    codes = codes.contiguous()
    out = torch.empty((columns, rows), dtype=codes.dtype, device=codes.device)
    ones = torch.empty((1, columns), dtype=torch.float32, device=codes.device)
    grid = (-(-columns // _TILE), -(-rows // _TILE), 1)
    unit = 1 if rows % _UNIT or columns % _UNIT else _UNIT
    _transpose_launcher(grid, (codes, out, ones), (rows // unit, columns // unit), (unit, _TILE), 4)
    return out, ones
