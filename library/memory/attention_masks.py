"""How attention kernels are told of padding: what is made of a key mask, once for all blocks that share it.

Kernels that take a mask as it is are slower than those that take none, so none of ours is given one.

**Variable-length kernels without packing.** These kernels take rows of tokens and the bounds of sequences among them,
and leave what lies outside all sequences uninitialised. Packing the real tokens would need their number on the host,
which would wait for the device. As padding lies behind the real tokens, there is nothing to pack: the padded batch,
seen as B*S rows, already is a row of 2B sequences [real tokens of sample 0 | its padding | real tokens of sample 1 | ...].
The padding of a sample attends to itself, which costs next to nothing and leaves no row and no gradient undefined. Only
the bounds depend on data, and those are read on the device. A sample without padding has an empty second sequence.

B batch, S tokens, A heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from library.memory.recompute import hidden_from_recomputation

AttentionFn = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
T = TypeVar("T")

_FLEX_BLOCK = 128  # tokens; flex_attention skips whole blocks of padding


class OncePerMask(Generic[T]):
    """Makes something from a key mask once, and gives the same to all blocks that ask with the same mask.

    All blocks of a forward pass, and their recomputation, are given one and the same tensor.
    """

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._make = make
        self._mask: Callable[[], Tensor | None] = lambda: None
        self._version = -1
        self._made: T | None = None

    def __call__(self, key_mask: Tensor) -> T:
        """Returns what ``make`` makes of the mask (B,S)."""
        # In a compiled block it is a part of the graph; a tensor of inference mode does not say when it was changed.
        if torch.compiler.is_compiling() or key_mask.is_inference():
            return self._make(key_mask)
        if self._made is None or self._mask() is not key_mask or self._version != key_mask._version:
            with hidden_from_recomputation():  # whether it is made here depends on what came before
                self._made = self._make(key_mask)
            self._mask, self._version = weakref.ref(key_mask), key_mask._version
        return self._made


def sequence_bounds(key_mask: Tensor) -> Tensor:
    """Returns where sequences begin and end in the B*S rows of a padded batch, without waiting for the device.

    Args:
        key_mask: (B,S) bool, the real tokens of a sample first.

    Returns:
        (2B + 1,) int32, not falling: 0, end of sample 0's real tokens, begin of sample 1, ... , B*S.
    """
    batch, length = key_mask.shape
    begins = torch.arange(0, batch * length, length, dtype=torch.int32, device=key_mask.device)
    ends = begins + key_mask.sum(dim=1, dtype=torch.int32)
    return F.pad(torch.stack([begins, ends], dim=1).flatten(), (0, 1), value=batch * length)


def by_sequences(over_sequences: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]) -> AttentionFn:
    """Returns attention by a variable-length kernel.

    Args:
        over_sequences: (queries (R,A,E), keys (R,K,E), values (R,K,E), bounds of sequences (N+1,) int32, longest
            possible sequence) -> (R,A,E).
    """
    bounds_of = OncePerMask(sequence_bounds)

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        batch, length = q.shape[:2]
        if key_mask is None:
            bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
        else:
            bounds = bounds_of(key_mask)
        rows = over_sequences(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, length)
        return rows.unflatten(0, (batch, length))

    return attention


def flex_block_mask(key_mask: Tensor) -> Any:
    """Returns the mask (B,S) bool as flex_attention's ``BlockMask``: blocks of keys that are all real, partly, or not.

    Made from the mask directly: torch's ``create_block_mask`` writes out an S x S matrix of each sample first.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, length = key_mask.shape
    blocks = -(-length // _FLEX_BLOCK)
    tokens = F.pad(key_mask, (0, blocks * _FLEX_BLOCK - length)).unflatten(1, (blocks, _FLEX_BLOCK))
    whole = tokens.all(dim=-1)  # (B,blocks)
    partly = tokens.any(dim=-1) & ~whole

    def in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
        count = chosen.sum(dim=-1, dtype=torch.int32)[:, None, None].expand(batch, 1, blocks)
        order = torch.argsort(chosen.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
        return count.contiguous(), order[:, None, None].expand(batch, 1, blocks, blocks).contiguous()

    def is_real(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key_mask[sample, key]

    return BlockMask.from_kv_blocks(
        *in_order(partly), *in_order(whole), BLOCK_SIZE=_FLEX_BLOCK, mask_mod=is_real, seq_lengths=(length, length)
    )
