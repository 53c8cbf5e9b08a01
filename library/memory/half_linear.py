"""Frozen weights in fp16 that are multiplied in fp16, beside a residual stream in float32 (``--mixed_precision fp16``).

Of a bf16 file every weight above 6e-5 stays what it is; smaller ones move by 3e-8 at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.memory.half_products import HALF
from library.memory.quantised import QuantisedLinear


class HalfLinear(QuantisedLinear):
    """A Linear whose weight is fp16 and which multiplies in fp16.

    Attributes:
        weight: (out,in) float16.
    """

    def __init__(self, weight: Tensor) -> None:
        """Takes a weight (out,in) of any float dtype."""
        super().__init__(weight.shape[1], weight.shape[0])
        self.register_buffer("weight", weight.to(HALF))
        self.multiply_in_halves(weight)

    def codes(self) -> tuple[Tensor, ...]:
        """Returns the weight."""
        return (self.weight,)

    def weight_of(self, codes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the weight (out,in) in ``dtype``."""
        return codes[0].to(dtype)
