"""Frozen weights in 4 bits (NF4 of QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), by bitsandbytes.

64 weights in a row share one float32 scale: 4.5 bits a weight. The scales are not quantised again (bitsandbytes'
``compress_statistics``): that would save 0.11 GiB of the 2.6 B model's 1.7, for a second launch and one more rounding
in every use, and blocks can be streamed from host memory where it has to be less.

Only bitsandbytes' two registered operators are used, which ``torch.compile`` traces. Its ``QuantState`` hides tensors in
a Python object, where neither ``.to(device)`` nor block streaming finds them; here all are buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import bitsandbytes  # noqa: F401 - registers the operators
import torch
from torch import Tensor

from library.memory.quantised import QuantisedLinear

BLOCK_SIZE = 64
_KIND = "nf4"


class Nf4Linear(QuantisedLinear):
    """A Linear whose weight is 4-bit codes times a scale for each 64 of them.

    Attributes:
        weight: (out * in / 2, 1) uint8, two codes a byte.
        absmax: (out * in / 64,) float32.
    """

    absmax: Tensor

    def __init__(self, weight: Tensor, absmax: Tensor, out_features: int, in_features: int) -> None:
        """Takes codes and scales; :meth:`of` makes them."""
        super().__init__(in_features, out_features)
        self.register_buffer("weight", weight)
        self.register_buffer("absmax", absmax)

    @classmethod
    def of(cls, weight: Tensor) -> Nf4Linear:
        """Returns the Linear for a weight (out,in) of any float dtype, on the weight's device."""
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK_SIZE, _KIND, torch.uint8)
        return cls(codes, absmax.float(), *weight.shape)

    def codes(self) -> tuple[Tensor, ...]:
        """Returns codes and scales."""
        return self.weight, self.absmax

    def weight_of(self, codes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the weight (out,in) that codes and scales stand for, in ``dtype``, in new memory."""
        weight, absmax = codes
        shape = [self.out_features, self.in_features]
        return torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, BLOCK_SIZE, _KIND, shape, dtype)
