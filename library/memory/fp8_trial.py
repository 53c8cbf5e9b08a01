"""Whether quantising and transposing for products in fp8 run as Triton kernels: tried once, compared with a CPU's results.

What may be missing stands in ``library.kernel_trial``. torch's operations do the work then: the same bits, more slowly.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from library.kernel_trial import tried

__all__ = ["failure_of", "kernels_on"]

_ROWS = 5
_WIDTHS = (2304, 3840, 9216)  # of Lumina: what is compiled here need not be in the first step
_MATRIX = (208, 400)  # no multiples of a tile


@functools.cache
def kernels_on(index: int) -> ModuleType | None:
    """Returns the module ``fp8_kernels`` if it works on a CUDA device, else None.

    A failed trial is warned about; that triton is not installed is none.
    """
    device = torch.device("cuda", index)
    return tried("library.memory.fp8_kernels", "Quantising for --fp8_fast", lambda kernels: failure_of(kernels, device))


def failure_of(kernels: ModuleType, device: torch.device) -> str | None:
    """Returns what is wrong with the kernels' results; None = nothing.

    Args:
        kernels: the module ``fp8_kernels``.
        device: where to try them.
    """
    from library.memory.fp8 import power_of_two_scale, quantise_rows

    generator = torch.Generator().manual_seed(0)
    for width in _WIDTHS:
        rows = torch.randn(_ROWS, width, generator=generator) * torch.logspace(-9, 9, _ROWS)[:, None]
        rows[0] = 0.0
        matrix = rows.bfloat16()
        factor = power_of_two_scale(torch.rand(width, generator=generator))
        cases = (
            ("quantising", (matrix.to(device),), matrix),
            ("quantising a gradient", (matrix.to(device), factor.to(device)), matrix * factor.bfloat16()),
        )
        for name, ours, theirs in cases * 2:  # twice, as a kernel is launched in another way as soon as it is compiled
            codes, scale = kernels.quantise_rows(*ours)
            expected, expected_scale = quantise_rows(theirs)
            if not (torch.equal(scale.cpu(), expected_scale) and torch.equal(_bits(codes), _bits(expected))):
                return f"a try of {name} gave wrong results"
    codes = torch.arange(_MATRIX[0] * _MATRIX[1]).remainder(251).to(torch.uint8).view(_MATRIX)
    for _ in range(2):
        transposed, ones = kernels.transpose(codes.view(torch.float8_e4m3fn).to(device))
        if not torch.equal(_bits(transposed), codes.t()) or not bool((ones == 1).all()):
            return "a try of transposing gave wrong results"
    return None


def _bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.cpu().view(torch.uint8)
