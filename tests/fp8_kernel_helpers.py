"""What quantising and transposing for products in fp8 are tried with, on a GPU and in Triton's interpreter.

As a program, with TRITON_INTERPRET=1 in the environment, it runs the kernels on the CPU and prints which results are, to the
bit, those of torch's operations.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from quantisation_helpers import realistic_gradient, realistic_tokens, realistic_weight
from torch import Tensor

from library.memory.fp8 import E4M3, power_of_two_scale, quantise_rows

# Widths of the model; no power of two, of a piece or of a vector of a load; narrower than a warp.
WIDTHS = (2304, 3840, 9216, 2048, 2064, 48, 16, 23, 1)


def odd_rows(width: int) -> Tensor:
    """Returns rows (11,width) bfloat16: zeros, values at the edges of codes and of ranges, infinity."""
    rows = realistic_tokens(11, width)
    rows[0] = 0.0
    rows[1] *= 1e-38  # subnormal numbers of bfloat16
    rows[2] *= 1e36
    rows[3] = torch.arange(width).remainder(512) / 512 * 448  # of 9 bits: halfway between codes too
    rows[4] = -(2.0 ** -torch.arange(width).remainder(24).float())  # down to less than half the smallest code
    rows[5], rows[5, 0] = 0.0, 448.0  # the largest code, and the least that needs the next scale
    rows[6], rows[6, -1] = 1.0, 450.0
    rows[7, width // 2] = math.inf
    rows[8, 0] = -math.inf
    rows[9] = torch.finfo(torch.bfloat16).max
    return rows.bfloat16()


def row_with_nan(width: int) -> Tensor:
    """Returns (1,width) bfloat16. What torch makes of its other numbers hangs on its version; a product is NaN anyway."""
    row = realistic_tokens(1, width)
    row[0, width // 3] = math.nan
    return row.bfloat16()


def quantised_cases() -> dict[str, tuple[Tensor, Tensor | None]]:
    """Returns matrices (M,C) bfloat16, each with a factor (C,) float32 or None."""
    cases: dict[str, tuple[Tensor, Tensor | None]] = {}
    for width in WIDTHS:
        factor = power_of_two_scale(realistic_weight(width, 8).abs().amax(1))
        cases[f"odd rows of {width}"] = odd_rows(width), None
        cases[f"odd gradients of {width}"] = odd_rows(width), factor
        cases[f"gradients of {width}"] = realistic_gradient(7, width).bfloat16(), factor
    cases["rows with gaps"] = realistic_tokens(5, 128).bfloat16()[:, 16:80], None
    cases["no rows"] = realistic_tokens(5, 64).bfloat16()[:0], None
    return cases


def transposed_cases() -> list[Tensor]:
    """Returns codes (out,in), with every code there is."""
    shapes = (384, 256), (208, 400), (16, 16), (3840, 48), (1, 7)
    return [torch.arange(rows * columns).to(torch.uint8).view(rows, columns).view(E4M3) for rows, columns in shapes]


def expected_rows(matrix: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns what torch's operations make of it."""
    return quantise_rows(matrix if factor is None else matrix * factor.to(matrix.dtype))


def same_codes(found: Tensor, expected: Tensor) -> bool:
    """Whether codes are equal to the bit; NaN has a sign, which means nothing."""
    ours, theirs = (codes.cpu().view(torch.uint8) for codes in (found, expected))
    both_nan = ((ours & 0x7F) == 0x7F) & ((theirs & 0x7F) == 0x7F)
    return found.shape == expected.shape and bool(((ours == theirs) | both_nan).all())


def _round_as_a_gpu() -> None:
    """Has the interpreter make e4m3 of float32 as GPUs do: to nearest, even; what is too large becomes the largest code.

    Its own way rounds half up, and loses the carry out of the mantissa.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values: Any, from_dtype: Any, to_dtype: Any, rounding: Any) -> Any:
        if to_dtype != tl.float8e4nv:
            return convert(values, from_dtype, to_dtype, rounding)
        assert from_dtype == tl.float32
        wide = torch.from_numpy(np.ascontiguousarray(values)).clamp(-448.0, 448.0)
        return wide.to(E4M3).view(torch.uint8).numpy()

    interpreter._convert_float = converted


def main() -> None:
    """Prints, for each case, whether all results are the expected ones."""
    from library.memory import fp8_kernels, fp8_trial

    _round_as_a_gpu()
    report = {}
    for name, (matrix, factor) in quantised_cases().items():
        codes, scale = fp8_kernels.quantise_rows(matrix, factor)
        expected, expected_scale = expected_rows(matrix, factor)
        report[name] = same_codes(codes, expected) and torch.equal(scale, expected_scale)
    for width in WIDTHS:
        codes, _ = fp8_kernels.quantise_rows(row_with_nan(width))
        report[f"NaN among {width}"] = bool(codes.float().isnan().all())
    for codes in transposed_cases():
        transposed, ones = fp8_kernels.transpose(codes)
        same = torch.equal(transposed.view(torch.uint8), codes.view(torch.uint8).t())
        report[f"codes of {tuple(codes.shape)}"] = same and torch.equal(ones, torch.ones(1, codes.shape[1]))
    report["the trial"] = fp8_trial.failure_of(fp8_kernels, torch.device("cpu")) is None
    print(json.dumps(report))


if __name__ == "__main__":
    main()
