"""Seconds of work on a device, and the most that the device gives."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CEILING_SIDE = {"cpu": 3072, "cuda": 8192}
_PRODUCTS = {"cpu": 1, "cuda": 10}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Returns how many seconds a piece of work takes, on the device too."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Ceiling:
    """A large matrix product of random numbers: zeros or equal numbers would let a processor clock higher."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._side, self._products = _CEILING_SIDE[device.type], _PRODUCTS[device.type]
        self._device = device
        self._a, self._b = (torch.randn(self._side, self._side, device=device).to(dtype) for _ in range(2))
        self._out = self._a @ self._b

    def measure(self) -> float:
        """Returns TFLOP/s of this moment."""

        def work() -> None:
            for _ in range(self._products):
                torch.mm(self._a, self._b, out=self._out)

        return self._products * 2 * self._side**3 / timed(work, self._device) / 1e12
