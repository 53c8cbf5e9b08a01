"""One saved-tensor handler for all that is done to what autograd keeps: of nested handlers only the innermost is asked.

It stands around everything else of a block, gradient checkpointing included. What a checkpointed block saves goes to
checkpointing's own handler, which is further inside; only the block's inputs come here, because checkpointing saves
those before it puts its handler up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.activation_offload import ActivationHandle, ActivationOffload
from library.memory.block_stream import BlockStream, WeightHandle
from library.memory.views import is_plain

Saved = Tensor | WeightHandle | ActivationHandle


class SavedTensors:
    """Keeps handles in place of streamed weights and of activations that go to the host."""

    def __init__(self, stream: BlockStream | None, offload: ActivationOffload | None) -> None:
        """Takes what is in use; None = weights are not streamed, or activations stay."""
        self._stream = stream
        self._offload = offload

    def attach(self, blocks: Iterable[nn.Module]) -> None:
        """Wraps the blocks' ``forward``; nothing else that changes it may come later."""
        for block in blocks:
            block.forward = self._saving(block.forward)

    def _saving(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def saving(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if self._offload is not None:
                self._offload.begin_block()
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                return forward(*args, **kwargs)

        return saving

    def _pack(self, tensor: Tensor) -> Saved:
        if not is_plain(tensor):
            return tensor
        handle: WeightHandle | ActivationHandle | None = None
        if self._stream is not None:
            handle = self._stream.pack(tensor)
        if handle is None and self._offload is not None:
            handle = self._offload.pack(tensor)
        return tensor if handle is None else handle

    def _unpack(self, saved: Saved) -> Tensor:
        if isinstance(saved, WeightHandle) and self._stream is not None:
            return self._stream.unpack(saved)
        if isinstance(saved, ActivationHandle) and self._offload is not None:
            return self._offload.unpack(saved)
        if not isinstance(saved, Tensor):
            raise RuntimeError(f"a {type(saved).__name__} was saved by another handler")
        return saved
