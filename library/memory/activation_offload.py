"""Activation offload: what autograd saves in a block waits in host memory until the backward pass comes to it.

Going out: when a block saves a large tensor, a copy of the tensor's whole storage into pinned host memory is ordered
beside the computation. Two blocks later the computation is told to wait for that copy, which is long over by then, and
the device memory is let go. So the device holds the activations of two blocks, however far the host is ahead.
(``Tensor.record_stream`` would let go at once, but free memory only when the device gets there: a host that is ahead would
find none free.)

Coming back: when the backward pass first asks for something that a block saved, everything of the block before it is
ordered back, and is there when its turn comes. What has not left the device yet is used as it is.

Whole storages are copied, not views: several views of one storage (queries, keys and values) take one copy, and come
back with the same strides, on which kernels depend. Host memory is cut into pages of one size, so that buckets of
different sizes share it without gaps.

A copy lives as long as autograd keeps a handle to it, so nothing here belongs to a pass: two forward passes before a
backward pass, a pass that an error ends, or a graph that is dropped need no care.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from library.memory.transport import Lane, Pairs, Transport
from library.memory.views import View, whole_storage

MIN_BYTES = 2**20  # smaller ones are not worth an order of their own, and together are small
PAGE_BYTES = 4 * 2**20
_PAGES_IN_SLAB = 16  # pinning takes long: it is done for many pages at once
_BLOCKS_ON_DEVICE = 2


class ActivationHandle(NamedTuple):
    """Stands for a tensor that autograd wanted to save."""

    copy: _Copy
    view: View
    group: _Group


class ActivationOffload:
    """Takes saved tensors to the host and back."""

    def __init__(
        self,
        transport: Transport,
        resident: Iterable[Tensor] = (),
        min_bytes: int = MIN_BYTES,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        """Prepares; host memory is taken as it is needed, and kept.

        Args:
            transport: how copies are ordered.
            resident: tensors that stay on the device anyway, such as weights; they are not taken out.
            min_bytes: tensors with a smaller storage stay.
            page_bytes: size of the pieces of host memory.
        """
        self._transport = transport
        # The storages themselves, not only their names, so that no other one gets the name of one that was let go.
        self._resident = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in resident)}
        self._min_bytes = min_bytes
        self._pages = _Pages(transport, page_bytes)
        self._recent: deque[_Group] = deque()
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Copy]]] = {}
        self._unsettled: deque[_InFlight] = deque()
        weakref.finalize(self, _settle, transport, self._unsettled, self._pages).atexit = False

    @property
    def num_host_bytes(self) -> int:
        """Bytes of host memory taken so far."""
        return self._pages.num_bytes

    def begin_block(self) -> None:
        """Says that the following tensors are saved by another block."""
        _settle(self._transport, self._unsettled, self._pages)
        group = _Group(self._recent[-1] if self._recent else None)
        self._recent.append(group)
        while len(self._recent) > _BLOCKS_ON_DEVICE:
            self._recent.popleft().let_go(self._transport)

    def pack(self, tensor: Tensor) -> ActivationHandle | None:
        """Returns a handle for a plain tensor after ordering its copy, or None for one that stays."""
        if tensor.device.type != self._transport.device.type or isinstance(tensor, nn.Parameter):
            return None
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._min_bytes or storage._cdata in self._resident:
            return None
        if not self._recent:
            self.begin_block()
        group = self._recent[-1]
        # The weak reference keeps the storage's identity from being given to another one.
        key = (storage._cdata, tensor._version)
        known = self._known.get(key)
        copy = known[1]() if known else None
        if copy is None:
            copy = _Copy(self, key, whole_storage(tensor))
            self._known[key] = (StorageWeakRef(storage), weakref.ref(copy))
            group.last_out = copy.out
        group.add(copy)
        return ActivationHandle(copy, View.of(tensor), group)

    def unpack(self, handle: ActivationHandle) -> Tensor:
        """Returns the tensor that a handle stands for, and orders the block before it back."""
        _settle(self._transport, self._unsettled, self._pages)
        bytes_on_device = handle.copy.use()
        handle.group.begin_backward()
        return handle.view.into(bytes_on_device)


class _Group:
    """What one call of a block saved."""

    def __init__(self, previous: _Group | None) -> None:
        self.last_out: Any = None
        self._copies: list[weakref.ref[_Copy]] = []
        self._previous = None if previous is None else weakref.ref(previous)
        self._is_in_backward = False

    def add(self, copy: _Copy) -> None:
        if not self._copies or self._copies[-1]() is not copy:
            self._copies.append(weakref.ref(copy))

    def let_go(self, transport: Transport) -> None:
        """Frees the device memory of what has been copied out."""
        if self.last_out is not None:
            transport.wait(self.last_out)  # copies out are in one queue, so this is the end of all of them
        for copy in filter(None, (reference() for reference in self._copies)):
            copy.original = None

    def begin_backward(self) -> None:
        """Orders back what this block needs, and then what the one before it will need."""
        if self._is_in_backward:
            return
        self._is_in_backward = True
        self.bring_back()
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous.bring_back()

    def bring_back(self) -> None:
        for reference in reversed(self._copies):
            copy = reference()
            if copy is not None:
                copy.bring_back()


class _Copy:
    """A storage that is, or is about to be, in host memory."""

    def __init__(self, owner: ActivationOffload, key: tuple[int, int], original: Tensor) -> None:
        self._owner = owner
        self._key = key
        self._num_bytes = original.numel()
        self.original: Tensor | None = None
        self._returned: Tensor | None = None
        self._back: Any = None
        self._is_back = False
        self._pages: list[Tensor] = []
        self._pages = owner._pages.take(self._num_bytes)
        # Free pages were settled: the computation has waited for their last copy, and this one comes after the computation.
        transport = owner._transport
        pairs = [(page, piece) for piece, page in self._pairs(original)]
        self.out = transport.copy(Lane.OUT, pairs, [transport.mark()])
        self.original = original

    def _pairs(self, device_bytes: Tensor) -> Pairs:
        """Returns pieces of memory on the device, each with what holds it in host memory."""
        pieces = device_bytes.split(self._owner._pages.page_bytes)
        return [(piece, page[: piece.numel()]) for piece, page in zip(pieces, self._pages, strict=True)]

    def bring_back(self) -> None:
        """Orders the storage back where it has left the device."""
        if self.original is not None or self._returned is not None:
            return
        transport = self._owner._transport
        memory = transport.device_buffer(self._num_bytes)
        self._back = transport.copy(Lane.BACK, self._pairs(memory), [self.out, transport.mark()])
        self._returned = memory

    def use(self) -> Tensor:
        """Returns the storage's bytes on the device, ready to be computed with."""
        if self.original is not None:
            return self.original
        self.bring_back()
        if self._returned is None:
            raise RuntimeError("an offloaded activation was not ordered back")
        if not self._is_back:
            self._owner._transport.wait(self._back)
            self._is_back = True
        return self._returned

    def __del__(self) -> None:
        # Whatever thread this runs in: what must not be let go yet is handed to the next call from the computation.
        owner = self._owner
        known = owner._known.get(self._key)
        if known is not None and known[1]() in (None, self):
            del owner._known[self._key]
        if self.original is not None:
            owner._unsettled.append(_InFlight(self.original, self.out, self._pages))
        elif self._returned is not None and not self._is_back:
            owner._unsettled.append(_InFlight(self._returned, self._back, self._pages))
        else:
            owner._pages.give_back(self._pages)


class _InFlight(NamedTuple):
    """Memory that a copy may still be touching."""

    memory: Tensor
    token: Any
    pages: list[Tensor]


class _Pages:
    """Pinned host memory in pieces of one size; what is free is settled."""

    def __init__(self, transport: Transport, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.num_bytes = 0
        self._transport = transport
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> list[Tensor]:
        """Returns pages for so many bytes.

        Raises:
            SettingsError: there is not enough host memory.
        """
        count = -(-num_bytes // self.page_bytes)
        while len(self._free) < count:
            slab = self._transport.host_buffer(_PAGES_IN_SLAB * self.page_bytes)
            self._free += slab.split(self.page_bytes)
            self.num_bytes += slab.numel()
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[Tensor]) -> None:
        """Takes pages back."""
        self._free += pages


def _settle(transport: Transport, unsettled: deque[_InFlight], pages: _Pages) -> None:
    """Lets go of memory whose copies nobody waited for."""
    while unsettled:
        transport.wait(unsettled[0].token)  # before it is taken off: an interrupt must not let go of it
        pages.give_back(unsettled.popleft().pages)
