"""Tells an error that says "too little memory" from every other one."""

from __future__ import annotations

import torch

# Only CUDA and its kin have an exception of their own; the others raise a plain RuntimeError.
_WORDS = ("DefaultCPUAllocator: ", "MPS backend out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised this because memory, the device's or the host's, was too small."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
