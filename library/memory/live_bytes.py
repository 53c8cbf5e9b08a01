"""Counts the bytes of a computation by the lifetimes of its tensors, and how long its operations would take on a device.

The computation may be a rehearsal on the meta device, where tensors have shapes but no memory: a training step of the
2.6 B model then takes a second or two and next to no memory, because the very code that trains is run. What
operations need inside their kernels, and what the allocator loses by fragmentation, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import addmm_flop, flop_registry

_ALIGNMENT_BYTES = 512  # what PyTorch's CUDA allocator rounds to
_FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, torch.ops.aten.addmm_: addmm_flop}


class Speed(NamedTuple):
    """What a device is taken to do in a second."""

    flops: float
    """Floating point operations of matrix products and attention."""
    bytes_moved: float
    """Bytes that other operations read and write."""


def count_flops_of(operation: Any, formula: Callable[..., int]) -> None:
    """Says how many operations an operator of ours does; ``formula`` is given its arguments and ``out_val``."""
    _FLOPS[operation] = formula


NO_TIME = Speed(float("inf"), float("inf"))


def rounded(num_bytes: int) -> int:
    """Returns what the allocator takes for so many bytes."""
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def bytes_of(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Returns the bytes of the tensors' storages on a device, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device == device}
    return sum(map(rounded, storages.values()))


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts every storage that is made on a device, from its first tensor to its last.

    Attributes:
        live: bytes that are there now.
        peak: the most there were since the start, or since :meth:`reset_peak`.
        seconds: how long the operations so far would have taken, each by its arithmetic or its bytes.
        num_flops: operations of matrix products and attention so far.
    """

    def __init__(self, device: torch.device, speed: Speed = NO_TIME) -> None:
        super().__init__()
        self.device = device
        self.live = 0
        self.peak = 0
        self.seconds = 0.0
        self.num_flops = 0
        self._speed = speed
        self._known: set[int] = set()

    def reset_peak(self) -> None:
        """Begins anew with what is live."""
        self.peak = self.live

    def add_flops(self, num_flops: int) -> None:
        """Takes operations into account that no operator of the computation shows."""
        self.num_flops += num_flops
        self.seconds += num_flops / self._speed.flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        if func.is_view:
            return out
        for tensor in _tensors(out):
            self._note(tensor)
        flops_of = _FLOPS.get(func._overloadpacket)
        num_flops = 0 if flops_of is None else int(flops_of(*args, **given, out_val=out))
        num_bytes = sum(t.numel() * t.element_size() for t in _tensors((args, given, out)) if t.device == self.device)
        if not func._schema.name.startswith("aten::empty"):
            self.num_flops += num_flops
            self.seconds += max(num_flops / self._speed.flops, num_bytes / self._speed.bytes_moved)
        return out

    def _note(self, tensor: Tensor) -> None:
        if tensor.device != self.device:
            return
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, rounded(storage.nbytes())
        if key in self._known:
            return
        self._known.add(key)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, num_bytes).atexit = False

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))
