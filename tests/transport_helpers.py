"""A stand-in for a device, as hostile as the contract of ``library.memory.transport`` allows.

Everything lies in ordinary memory, and the computation runs at once. Copies are *late*: one runs when the computation
waits for it, or when a copy that it was given to needs it, and not before; until then its destination holds NaNs. So who
reads without waiting reads NaN. What cannot be seen in numbers here, because the computation is never behind, is checked
by a clock: each operation is a tick, and a copy into memory that the computation used must be given a mark that is not
older than that use. Every neglected duty of the contract's list is an error that says which.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.transport import Lane
from library.memory.views import View

_NAN = 0xFF  # all bits set are a NaN in every float type
_HOST_BEGIN = 192  # bytes; torch aligns ordinary memory to 64


class ContractError(AssertionError):
    """A duty of the transport's user was neglected."""


@dataclass(frozen=True)
class Mark:
    time: int


@dataclass
class Memory:
    """What is known of a storage."""

    reference: StorageWeakRef
    is_host: bool
    last_use: int = -1


@dataclass(frozen=True)
class Piece:
    """A tensor that is not kept alive."""

    reference: StorageWeakRef
    view: View

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        return cls(StorageWeakRef(tensor.untyped_storage()), View.of(tensor))

    @property
    def key(self) -> int:
        return self.reference.cdata

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.reference.cdata)
        if storage is None:
            raise ContractError("device memory was let go before the computation waited for the copy that touches it")
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
        return self.view.into(whole)


@dataclass(eq=False)
class Order:
    lane: Lane
    destinations: list[Piece]
    sources: list[Piece]
    after: list[Any]
    is_done: bool = False
    before: Order | None = field(default=None, repr=False)

    def precedes(self, other: Order) -> bool:
        """Whether ``other`` cannot run before this one has."""
        reached, todo = set(), [other]
        while todo:
            order = todo.pop()
            if order is self:
                return True
            if id(order) in reached or order.is_done:
                continue
            reached.add(id(order))
            todo += [token for token in order.after if isinstance(token, Order)]
            if order.before is not None:
                todo.append(order.before)
        return False


class LateTransport:
    """The stand-in. ``num_copies`` counts orders of each lane."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.time = 0
        self.is_copying = False
        self.memories: dict[int, Memory] = {}
        self.pending: list[Order] = []
        self.being_written: Counter[int] = Counter()  # how many pending orders write to a storage
        self.being_read: Counter[int] = Counter()
        self.last: dict[Lane, Order] = {}
        self.num_copies = dict.fromkeys(Lane, 0)

    # ---- the contract ----

    def host_buffer(self, num_bytes: int) -> Tensor:
        return self._buffer(num_bytes, is_host=True)

    def device_buffer(self, num_bytes: int) -> Tensor:
        return self._buffer(num_bytes, is_host=False)

    def mark(self) -> Mark:
        return Mark(self.time)

    def copy(self, lane: Lane, pairs: Sequence[tuple[Tensor, Tensor]], after: Iterable[Any]) -> Order:
        for destination, source in pairs:
            assert destination.dtype == source.dtype
            assert destination.shape == source.shape
        destinations, sources = ([Piece.of(pair[side]) for pair in pairs] for side in (0, 1))
        order = Order(lane, destinations, sources, list(after), before=self.last.get(lane))
        self._check(order)
        for token in order.after:
            if isinstance(token, Order):
                self._run(token)
        with self._copying():
            for piece in destinations:
                whole = piece.tensor()
                whole.view(torch.uint8).fill_(_NAN)
        self.pending.append(order)
        self.being_written.update({piece.key for piece in destinations})
        self.being_read.update({piece.key for piece in sources})
        self.last[lane] = order
        self.num_copies[lane] += 1
        return order

    def wait(self, token: Mark | Order) -> None:
        if isinstance(token, Order):
            self._run(token)

    # ---- how it works ----

    def finish(self) -> None:
        """Runs what nobody waited for: it must still be possible."""
        while self.pending:
            self._run(self.pending[0])

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Checks every operation of the computation in here; at the end, all copies can still run."""
        try:
            with _Watch(self):
                yield
            self.finish()
        except BaseException:
            for order in self.pending:  # what comes after a fault has no meaning
                order.is_done = True
            self.pending.clear()
            self.being_written.clear()
            self.being_read.clear()
            raise

    def _buffer(self, num_bytes: int, is_host: bool) -> Tensor:
        # As pinned memory, which begins at the first whole page, a host buffer does not begin where its storage does.
        begin = _HOST_BEGIN if is_host else 0
        with self._copying():
            buffer = torch.full((begin + num_bytes,), _NAN, dtype=torch.uint8)[begin:]
        reference = StorageWeakRef(buffer.untyped_storage())
        # As on a device: the memory had another use, which is over only at the next mark.
        self.time += 1
        self.memories[reference.cdata] = Memory(reference, is_host, last_use=-1 if is_host else self.time)
        return buffer

    def _run(self, order: Order) -> None:
        if order.is_done:
            return
        if order.before is not None:
            self._run(order.before)
        for token in order.after:
            if isinstance(token, Order):
                self._run(token)
        with self._copying():
            for destination, source in zip(order.destinations, order.sources, strict=True):
                destination.tensor().copy_(source.tensor())
        order.is_done, order.before = True, None
        self.pending.remove(order)
        self.being_written.subtract({piece.key for piece in order.destinations})
        self.being_read.subtract({piece.key for piece in order.sources})

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        before, self.is_copying = self.is_copying, True
        try:
            yield
        finally:
            self.is_copying = before

    def _check(self, order: Order) -> None:
        newest = max((token.time for token in order.after if isinstance(token, Mark)), default=-1)
        for piece in order.destinations:
            memory = self.memories.get(piece.key)
            if memory is not None and memory.last_use > newest:
                raise ContractError("memory is overwritten while the computation may still use it")
        for piece in order.sources:
            # The computation writes to all other memory whenever it likes.
            if piece.key not in self.memories and newest < self.time:
                raise ContractError("memory is copied that the computation may still be writing")
        for other in self.pending:
            written = {piece.key for piece in other.destinations}
            used = written | {piece.key for piece in other.sources}
            hit = any(_overlap(piece, other) for piece in order.destinations if piece.key in used)
            hit |= any(_overlap(piece, other) for piece in order.sources if piece.key in written)
            if hit and not other.precedes(order):
                raise ContractError("two lanes' copies touch the same memory in no order")

    def note_operation(self, function: Any, tensors: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Checks an operation of the computation, which uses ``tensors`` and writes to some of them."""
        if function._schema.name.startswith(("aten::set_", "aten::empty")):
            return
        self.time += 1
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            memory = self.memories.get(key)
            if memory is not None:
                if memory.is_host:
                    raise ContractError(f"{function} computes with host memory")
                memory.last_use = self.time
            if self.being_written[key]:
                raise ContractError(f"{function} uses memory whose copy was not waited for")
        for tensor in written:
            if self.being_read[tensor.untyped_storage()._cdata]:
                raise ContractError(f"{function} writes to memory that is being copied")


def _overlap(piece: Piece, order: Order) -> bool:
    first, last = _span(piece)
    return any(
        other.key == piece.key and first < _span(other)[1] and _span(other)[0] < last
        for other in (*order.destinations, *order.sources)
    )


def _span(piece: Piece) -> tuple[int, int]:
    size = torch.empty(0, dtype=piece.view.dtype).element_size()
    length = 1 + sum((n - 1) * step for n, step in zip(piece.view.shape, piece.view.stride, strict=True))
    return piece.view.offset * size, (piece.view.offset + length) * size


class _Watch(TorchDispatchMode):
    def __init__(self, transport: LateTransport) -> None:
        super().__init__()
        self.transport = transport

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (self.transport.is_copying or func.is_view):
            given = kwargs or {}
            self.transport.note_operation(func, _tensors((*args, *given.values())), _written(func, args, given))
        return func(*args, **(kwargs or {}))


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors that an operation writes to, as its schema tells."""
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors([args[place] if place < len(args) else kwargs.get(argument.name)])


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
