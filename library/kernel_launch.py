"""Launches Triton's kernels in few microseconds of the host's time.

For each launch Triton binds the arguments, asks of each what code would have to be compiled for it (its dtype, whether it
lies at a multiple of 16 bytes, whether a number is one or a multiple of 16), and looks the compiled kernel up by all of
that. A training step launches some hundred kernels each way, all alike, and with small pictures it is the host that a step
waits for.

Here the compiled kernel is kept after Triton's own first launch, and found by what is left to vary: device, dtypes and
constants. Two things keep that exact. Tensors at odd addresses are left to Triton. And kernels declare their numbers as
``do_not_specialize``, so that one code serves all; a float has but one type, and an integer one as long as it fits 32 bits.

A kept kernel is launched as Triton's ``JITFunction.run`` does it in the versions below; other versions, and AMD's GPUs,
where code is made for sizes as well, launch by Triton's ordinary way. The trial at the start runs both ways. What is
switched on in the middle of a run, such as Triton's launch hooks, is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from library.kernel_trial import on_device_of

__all__ = ["Launcher", "pieces"]

_FIRST_KNOWN, _LAST_KNOWN = (3, 6), (3, 9)  # versions of triton
_ALIGNMENT = 16  # bytes
_PIECE = 256  # numbers of a row that a warp takes at once: 16 bytes of halves a lane
_PIECES = 9  # of a row at most, for which a warp has the registers
_LARGEST = 2**31 - 1


def _is_known(version: str, is_amd: bool) -> bool:
    """Whether compiled kernels can be launched here.

    Args:
        version: of triton, such as "3.6.0" or "3.6.0.post25".
        is_amd: whether torch is a build for AMD's GPUs.
    """
    major, minor = version.split(".")[:2]
    return not is_amd and _FIRST_KNOWN <= (int(major), int(minor)) <= _LAST_KNOWN


_IS_KNOWN = _is_known(triton.__version__, torch.version.hip is not None)


def pieces(width: int) -> tuple[int, int]:
    """Returns how many numbers of a row are taken at once, a power of two, and by how many warps."""
    piece = max(_PIECE, triton.next_power_of_2(-(-width // _PIECES)))
    return min(piece, triton.next_power_of_2(width)), piece // _PIECE


class Launcher:
    """A kernel that is launched on the device of its tensors, on the current stream."""

    def __init__(self, kernel: Any) -> None:
        """Keeps a function of ``triton.jit``.

        Args:
            kernel: its arguments are tensors, then numbers (integers all ``do_not_specialize``), then constants.
        """
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        numbers: tuple[int | float, ...],
        constants: tuple[int | bool, ...],
        num_warps: int,
    ) -> None:
        """Launches the kernel.

        Args:
            grid: number of programs along each axis.
            tensors: all on one device.
            numbers: not negative.
            constants: what the code is compiled for.
            num_warps: of a program.
        """
        arguments = (*tensors, *numbers, *constants)
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        with on_device_of(tensors[0]):
            if not _IS_KNOWN or addresses % _ALIGNMENT or max(numbers, default=0) > _LARGEST:
                self._kernel[grid](*arguments, num_warps=num_warps)
                return
            index = tensors[0].get_device()
            key = (index, num_warps, constants, *[tensor.dtype for tensor in tensors])
            compiled = self._compiled.get(key)
            if compiled is None:
                # Triton's interpreter compiles nothing, and returns None.
                self._compiled[key] = self._kernel[grid](*arguments, num_warps=num_warps)
                return
            stream = driver.active.get_current_stream(index)
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(*grid, stream, function, metadata, None, None, None, *arguments)  # None: of hooks
