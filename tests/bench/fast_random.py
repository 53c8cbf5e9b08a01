"""Random numbers by the billion: drawn once, then read again and again from another place.

A model of 2.6 B parameters takes half a minute to draw with torch's generator on a CPU and seconds this way. Whoever
measures speed or memory needs numbers that look random, not independent ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DRAWN = 2**24
_STEP = 2_750_159  # between two uses, so that tensors of one size do not hold the same numbers


class NormalNumbers:
    """Numbers from N(0, 1), the same at every start."""

    def __init__(self, drawn: int = _DRAWN, device: torch.device | str = "cpu") -> None:
        """Draws ``drawn`` numbers, all that there are, the same on every ``device``."""
        self._numbers = torch.randn(drawn, generator=torch.Generator().manual_seed(0)).to(device)
        self._rounded = {self._numbers.dtype: self._numbers}
        self._begin = 0

    def take(self, count: int, scale: float, dtype: torch.dtype) -> Tensor:
        """Returns (count,) numbers times ``scale`` in ``dtype``."""
        self._begin = (self._begin + _STEP) % len(self._numbers)
        if dtype not in self._rounded:
            self._rounded[dtype] = self._numbers.to(dtype)
        numbers = self._rounded[dtype]
        taken = torch.empty(count, dtype=dtype, device=numbers.device)
        at, begin = 0, self._begin
        while at < count:
            part = numbers[begin : begin + count - at]
            torch.mul(part, scale, out=taken[at : at + len(part)])
            at, begin = at + len(part), 0
        return taken
