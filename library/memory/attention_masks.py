"""How attention kernels are told of padding: what is made of a key mask, once for all blocks that share it.

Kernels that take a mask as it is are slower than those that take none, so none of ours is given one.

**Variable-length kernels without packing.** These kernels take rows of tokens and the bounds of sequences among them,
and leave what lies outside all sequences uninitialised. Packing the real tokens would need their number on the host,
which would wait for the device. As padding lies behind the real tokens, there is nothing to pack: the padded batch,
seen as B*S rows, already is a row of 2B sequences [real tokens of sample 0 | its padding | real tokens of sample 1 | ...].
The padding of a sample attends to itself, which costs next to nothing and leaves no row and no gradient undefined. Only
the bounds depend on data, and those are read on the device. A sample without padding has an empty second sequence.

**Padding marked in further channels.** A kernel for batches without padding can leave padding out by itself: queries get
eight channels more, all 1, and keys eight more, 0 where real and -2^15 where padded. What they add to a score is exactly 0
for a real key and -2^18 for a padded one, whose share of the softmax, and with it every gradient, is then exactly 0. Values
stay as they are. cuDNN's kernels for Hopper compute in tiles of 128 channels (their names say so), so that 104 channels cost
what 96 do, while a mask makes them 1.6 times slower. What is left is a copy of queries and keys.

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
_MARKS = 8  # channels; kernels want head sizes that are multiples of it
# Exact in bf16 and fp16. Eight of them put a padded key 2^18 / sqrt(E) below a real one, which is 26755 in Lumina: exp() of
# a float32 is 0 from -104 on, and normalised queries and keys score some hundreds at the very most.
_MARK = -(2.0**15)


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


def padding_marks(key_mask: Tensor) -> Tensor:
    """Returns (B,S,1,1) float32 of a key mask (B,S) bool: 0 where real, and what marks padding elsewhere."""
    return key_mask.logical_not()[:, :, None, None].to(torch.float32) * _MARK


def by_marks(unmasked: Callable[[Tensor, Tensor, Tensor, float], Tensor], widens_values: bool = False) -> AttentionFn:
    """Returns attention by a kernel that takes no mask.

    Args:
        unmasked: (queries (B,S,A,E'), keys (B,S,K,E'), values (B,S,K,E), factor of the scores) -> (B,S,A,E), where E' is E
            or, with padding, E + 8.
        widens_values: give it values of E' channels too, for kernels that want all to be alike.
    """
    marks_of = OncePerMask(padding_marks)

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        head_dim = q.shape[-1]
        scale = head_dim**-0.5
        if key_mask is None:
            return unmasked(q, k, v, scale)
        marks = marks_of(key_mask).to(q.dtype)
        # Each of the parts is contiguous, which is when they are put together fastest.
        q = torch.cat([q, q.new_ones((*q.shape[:-1], _MARKS))], dim=-1)
        k = torch.cat([k, marks.expand(*k.shape[:-1], _MARKS).contiguous()], dim=-1)
        if widens_values:
            v = torch.cat([v, v.new_zeros((*v.shape[:-1], _MARKS))], dim=-1)
        return unmasked(q, k, v, scale)[..., :head_dim]

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
