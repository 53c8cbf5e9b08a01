"""Which pictures are trained on in which order: a pure function of seed, epoch and global batch size.

A plan is made of global batches, those of all processes together, and each process takes its part of every batch. So
two processes with batch size 1 see what one process with batch size 2 sees, in the same order.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

from library import keyed_random
from library.data.buckets import Size
from library.data.items import Draw

MakeDraw = Callable[..., Draw]
"""(item index, epoch, repeat) -> the showing; with the keyword ``step`` where the plan knows its optimizer steps."""
StepOf = Callable[[int], int]
"""number of a global batch in its epoch -> optimizer steps done before it."""


class Members(Sequence[tuple[int, int]]):
    """(item index, number of repeats) of pictures, in flat arrays, because there may be 100,000."""

    def __init__(self) -> None:
        self._items, self._repeats = array("i"), array("i")

    def add(self, item: int, repeats: int) -> None:
        """Adds a picture."""
        self._items.append(item)
        self._repeats.append(repeats)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return list(zip(self._items[number], self._repeats[number], strict=True))
        return self._items[number], self._repeats[number]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._items, self._repeats, strict=True)


@dataclass(frozen=True)
class Group:
    """Pictures that may share a batch: one bucket of one dataset.

    Attributes:
        dataset_index: the dataset.
        bucket_px: its bucket.
        batch_size: per process.
        members: (item index, number of repeats) in a fixed order.
    """

    dataset_index: int
    bucket_px: Size
    batch_size: int
    members: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The showings of one step over all processes."""

    epoch: int
    slots: tuple[tuple[int, int], ...]
    make_draw: MakeDraw

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def draws(self) -> tuple[Draw, ...]:
        """The showings, made anew at each call: a plan of a million showings keeps only numbers."""
        return self._draws(self.slots)

    def split(self, rank: int, num_processes: int) -> tuple[Draw, ...]:
        """Returns this process's consecutive part; parts differ by at most one, the first ones are the larger."""
        share, extra = divmod(len(self.slots), num_processes)
        start = rank * share + min(rank, extra)
        return self._draws(self.slots[start : start + share + (rank < extra)])

    def _draws(self, slots: Iterable[tuple[int, int]]) -> tuple[Draw, ...]:
        return tuple(self.make_draw(item, self.epoch, repeat) for item, repeat in slots)


class EpochPlan:
    """The global batches of one epoch, in order."""

    def __init__(
        self,
        epoch: int,
        items: array[int],
        repeats: array[int],
        starts: array[int],
        make_draw: MakeDraw,
        step_of: StepOf | None = None,
    ) -> None:
        self.epoch = epoch
        self._items = items
        self._repeats = repeats
        self._starts = starts
        self._make_draw = make_draw
        self._step_of = step_of
        self.batches: Sequence[GlobalBatch] = _Batches(self)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def num_draws(self) -> int:
        """Showings of the whole epoch."""
        return len(self._items)

    def batch(self, number: int) -> GlobalBatch:
        """Returns one global batch, counted from 0."""
        part = slice(self._starts[number], self._starts[number + 1])
        slots = tuple(zip(self._items[part], self._repeats[part], strict=True))
        make_draw = self._make_draw if self._step_of is None else partial(self._make_draw, step=self._step_of(number))
        return GlobalBatch(self.epoch, slots, make_draw)


class _Batches(Sequence[GlobalBatch]):
    """A plan's batches as a sequence whose elements are made when they are asked for."""

    def __init__(self, plan: EpochPlan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    @overload
    def __getitem__(self, number: int) -> GlobalBatch: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[GlobalBatch]: ...

    def __getitem__(self, number: int | slice) -> GlobalBatch | Sequence[GlobalBatch]:
        numbers = range(len(self._plan))[number]
        if isinstance(numbers, int):
            return self._plan.batch(numbers)
        return tuple(self._plan.batch(each) for each in numbers)

    def __iter__(self) -> Iterator[GlobalBatch]:
        return map(self._plan.batch, range(len(self._plan)))


def make_plan(
    groups: Sequence[Group],
    seed: int,
    epoch: int,
    num_processes: int,
    make_draw: MakeDraw,
    step_of: StepOf | None = None,
) -> EpochPlan:
    """Returns the plan of one epoch.

    Every showing occurs exactly once. The showings of a group are shuffled and cut into global batches, of which the
    last may be short; then all batches of all groups are shuffled.

    Args:
        groups: what may be batched together; their order does not matter.
        seed: of the run.
        epoch: counted from 1.
        num_processes: a global batch holds ``batch_size * num_processes`` showings.
        make_draw: called with (item index, epoch, repeat) and, where ``step_of`` is given, ``step=``.
        step_of: the optimizer step of a global batch.
    """
    # Numbers in flat arrays throughout: an epoch of a million showings as tuples would take hundreds of megabytes.
    slot_items, slot_repeats, order, batch_starts = array("i"), array("i"), array("i"), array("i")
    for group in sorted(groups, key=lambda group: (group.dataset_index, group.bucket_px)):
        first = len(slot_items)
        for item, num_repeats in group.members:
            slot_items.extend([item] * num_repeats)
            slot_repeats.extend(range(num_repeats))
        in_group = array("i", range(first, len(slot_items)))
        keyed_random.python_random("group order", seed, epoch, group.dataset_index, *group.bucket_px).shuffle(in_group)
        order += in_group
        batch_starts.extend(range(first, len(slot_items), group.batch_size * num_processes))
    numbers = array("i", range(len(batch_starts)))
    keyed_random.python_random("batch order", seed, epoch).shuffle(numbers)
    batch_starts.append(len(order))
    items, repeats, starts = array("i"), array("i"), array("i", [0])
    for number in numbers:
        slots = order[batch_starts[number] : batch_starts[number + 1]]
        items.extend(slot_items[slot] for slot in slots)
        repeats.extend(slot_repeats[slot] for slot in slots)
        starts.append(len(items))
    return EpochPlan(epoch, items, repeats, starts, make_draw, step_of)


def count_batches(groups: Iterable[Group], num_processes: int) -> int:
    """Returns the number of global batches of an epoch without making a plan."""
    total = 0
    for group in groups:
        slots = sum(repeats for _, repeats in group.members)
        total += -(-slots // (group.batch_size * num_processes))
    return total
