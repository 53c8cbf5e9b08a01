"""Random draws that are pure functions of a key, so that they never depend on worker, rank or order of execution.

Every draw of a run (noise, sigma, caption, flip, dropout, data order) names what it is for and what it belongs to, for
example ``generator("noise", seed, epoch, item)``. Two runs that ask for the same key get the same numbers, whether they
have one process or eight, were interrupted or not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def key(*parts: int | str) -> int:
    """Returns a 63-bit integer that depends on all parts and their order (BLAKE2b, the same on every machine)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def python_random(*parts: int | str) -> random.Random:
    """Returns Python's generator seeded by the key."""
    return random.Random(key(*parts))


def generator(*parts: int | str) -> torch.Generator:
    """Returns a CPU ``torch.Generator`` seeded by the key; draw on the CPU so that every device sees the same numbers."""
    import torch

    return torch.Generator().manual_seed(key(*parts))


def normal(purpose: str, keys: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Returns (B, *shape) float32 on the CPU, drawn from N(0, 1): one row for each key."""
    import torch

    return torch.stack([torch.randn(tuple(shape), generator=generator(purpose, row_key)) for row_key in keys])


def uniform(purpose: str, keys: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Returns (B, *shape) float32 on the CPU, drawn from U[0, 1): one row for each key."""
    import torch

    return torch.stack([torch.rand(tuple(shape), generator=generator(purpose, row_key)) for row_key in keys])
