"""Stand-ins for what a rehearsed training step cannot have on the meta device: attention kernels, and copies to the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from library.memory.live_bytes import LiveBytes, count_flops_of
from library.memory.transport import Lane, Pairs


class RehearsedAttention:
    """Keeps and needs what flash attention does, and computes nothing; an ``AttentionFn``.

    Kept for the backward pass: queries, keys, values, the output, and a float32 logarithm a row. The backward kernel adds
    queries' gradients up in float32, and makes keys' and values' gradients of every head before it adds those of a group.
    """

    def __init__(self, counter: LiveBytes, expands: bool) -> None:
        """Takes what counts.

        Args:
            counter: of bytes and operations.
            expands: write keys and values out for every head, as torch's own kernels want it with a mask or in float32.
        """
        self._counter = counter
        self._expands = expands

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Returns (B,S,A,E) of no particular values."""
        if self._expands:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        return _Rehearsed.apply(q, k, v, self._counter)


@torch.library.custom_op("lumina::rehearsed_attention", mutates_args=())
def _kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and a float32 logarithm a row. An operator, so that selective checkpointing keeps its results as it keeps those
    of the real kernels."""
    return _made(q, k, v)


@_kernel.register_fake
def _made(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), rows


def _num_flops(q: Tensor, k: Tensor) -> int:
    """Returns the operations of q k' and p v; (B,S,A,E) each."""
    batch, length, heads, head_dim = q.shape
    return 4 * batch * heads * length * k.shape[1] * head_dim


class _Rehearsed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, counter: LiveBytes) -> Tensor:
        out, rows = _kernel(q, k, v)
        ctx.save_for_backward(q, k, v, out, rows)
        ctx.counter = counter
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, _, _ = ctx.saved_tensors
        ctx.counter.add_flops(2 * _num_flops(q, k))
        workspace = [torch.empty_like(q, dtype=torch.float32)]
        if q.shape[2] != k.shape[2]:
            workspace += [torch.empty_like(q), torch.empty_like(q)]
        of_q, of_k, of_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        del workspace
        return of_q, of_k, of_v, None


count_flops_of(torch.ops.lumina.rehearsed_attention, lambda q, k, v, out_val: _num_flops(q, k))


class RehearsedTransport:
    """A :class:`~library.memory.transport.Transport` whose copies take place nowhere; counts their bytes by lane."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes = dict.fromkeys(Lane, 0)

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Returns memory that nobody counts."""
        with _disable_current_modes():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def device_buffer(self, num_bytes: int) -> Tensor:
        """Returns memory that is counted."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> None:
        """Nothing is ever late here."""

    def copy(self, lane: Lane, pairs: Pairs, after: Iterable[Any]) -> None:
        """Counts the copies."""
        self.num_bytes[lane] += sum(source.numel() * source.element_size() for _, source in pairs)

    def wait(self, token: Any) -> None:
        """Nothing is ever late here."""
