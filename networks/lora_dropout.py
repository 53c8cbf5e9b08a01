"""Which rank activations a dropout keeps: a pure function of the sample's key, the module's name and the position.

Nothing is drawn from a random number generator: it is integer hashing on the device. So two processes drop what one process
with twice the batch would drop, gradient checkpointing recomputes with the same masks, and ``torch.compile`` sees nothing
but tensor arithmetic.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_GAMMA_INVERSE = pow(0x9E3779B97F4A7C15, -1, 2**64) - 2**64  # gamma is odd, so there is one modulo 2^64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
# What a dropout's hash is for, so that the three kinds never share their bits.
NEURON, RANK, WHOLE_MODULE = 1, 2, 3


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 has an arithmetic shift only; the mask turns it into a logical one.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Returns splitmix64's finaliser of int64 ``x`` (Steele et al. 2014, variant 13 by Stafford); overflow wraps."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def kept(keys: Tensor, module_number: Tensor, purpose: int, positions: int, drop: float) -> Tensor:
    """Returns which positions are kept: a splitmix64 stream for each sample, seeded by key, module and purpose.

    Args:
        keys: (B,) int64, one key for each sample.
        module_number: () int64, the module's number.
        purpose: what the draw is for: ``NEURON``, ``RANK`` or ``WHOLE_MODULE``.
        positions: number of positions P; position i gets the same draw whatever P is.
        drop: probability of dropping, in [0, 1), resolved to 2^-32.

    Returns:
        (B,P) bool.
    """
    seed = mix(mix(keys ^ module_number) + purpose)  # (B,)
    numbers = torch.arange(1, positions + 1, device=keys.device, dtype=torch.int64)  # (P,)
    # State i is seed + i * gamma, computed as (seed / gamma + i) * gamma. A position times a constant would be index
    # arithmetic to torch.compile, and in Triton that is int32: gamma has no room there. A sum with what is read has.
    states = ((seed * _GAMMA_INVERSE)[:, None] + numbers) * _GOLDEN_GAMMA  # (B,P)
    return _shift_right(mix(states), 32) >= int(drop * 2**32)


def number_of(*parts: object) -> int:
    """Returns a 63-bit number that depends on all parts (BLAKE2b, the same on every machine)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class DropoutKeys:
    """The keys of the samples that are in the batch now; one object is shared by all modules of a network."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
