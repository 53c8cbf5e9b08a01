"""Gradient checkpointing, applied from outside to the blocks of a model."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(blocks: Iterable[nn.Module], preserve_rng_state: bool) -> None:
    """Makes each block keep only its inputs in forward, and compute the rest again in backward.

    Wraps the blocks' ``forward``, so it comes after LoRA has been attached to what is inside them.

    Args:
        blocks: modules that are run once a forward pass.
        preserve_rng_state: set it where something in a block draws from torch's global generators; costs a copy of
            their states per block.
    """
    for block in blocks:
        block.forward = _recomputed(block.forward, preserve_rng_state)


def _recomputed(forward: Any, preserve_rng_state: bool) -> Any:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs)

    return recomputed
