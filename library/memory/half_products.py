"""Products of matrices in fp16 that cannot overflow, for cards that have no other fast ones: T4, V100, RTX 20.

fp16 holds numbers up to 65504, and activations of this model are larger. But the rows of a product may be given in any
unit. By Cauchy and Schwarz no number of x W' is larger than |x| |w|, the lengths of a row of each. So a row is divided by
its length times the largest length in W, over 2^15: whatever the numbers are, neither the row nor its products leave fp16,
nor do partial sums. What comes out is multiplied by the unit again, in float32. Down to 2^-29 of the bound numbers keep
all of fp16's 11 bits, three more than bf16 has; only below 2^-40 are they lost.

The input's gradient is a product with the columns of W and has a unit of its own. So losses need no scale, as they do
where whole models run in fp16, and no step is ever left out for one that was too large.

CPUs have no such units: there the same numbers are multiplied in float32 and the result is rounded to fp16.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = torch.float16
_LARGEST = 2.0**15  # of a result or an operand; half of what fp16 holds, for what is rounded
SMALLEST_UNIT = 2.0**-60  # of rows so short that the squares of their numbers vanish in float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 without a detour, as far as that is known."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def bounds_of(weight: Tensor) -> Tensor:
    """Returns the largest length of a row and that of a column of a weight (out,in), 1 or more: (2,) float32."""
    lengths = [torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float32).amax() for dim in (1, 0)]
    return torch.stack(lengths).clamp(min=1)


def half_product(x: Tensor, matrix: Tensor, bound: Tensor) -> Tensor:
    """Returns x ``matrix`` in float32, multiplied in fp16.

    Args:
        x: (...,K) float32, of rows up to 1e19 long.
        matrix: (K,N) float16.
        bound: () float32, no less than the length of any column of ``matrix``, and than 1.

    Returns:
        (...,N) in new memory; NaN where a row of ``x`` is not finite.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = (length * (bound / _LARGEST)).clamp_(min=SMALLEST_UNIT)  # (...,1)
    return _multiplied(in_unit(x, unit), matrix) * unit


def in_unit(x: Tensor, unit: Tensor) -> Tensor:
    """Returns ``x`` / ``unit`` in fp16, of the shape of ``x``."""
    if torch.compiler.is_compiling():
        return (x / unit).to(HALF)
    # Rounded on its way: without a float32 quotient in between, on a GPU.
    return torch.div(x, unit, out=torch.empty(x.shape, dtype=HALF, device=x.device))


def _multiplied(halves: Tensor, matrix: Tensor) -> Tensor:
    if halves.device.type == "cpu":
        return (halves.float() @ matrix.float()).to(HALF)
    return halves @ matrix
