"""Tells an error that says "too little memory" from every other one."""

from __future__ import annotations

import torch

# Only torch on CUDA and its kin has an exception of its own; the others raise a plain RuntimeError. Triton's is about the
# memory that a kernel's code goes to.
_WORDS = ("DefaultCPUAllocator: ", "MPS backend out of memory", "Triton Error [CUDA]: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Triton raised this because memory, the device's or the host's, was too small."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
