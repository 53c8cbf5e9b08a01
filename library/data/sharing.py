"""How processes share work whose result all of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Gather = Callable[[list[Any]], list[list[Any]]]


@dataclass(frozen=True)
class Sharing:
    """How processes share a piece of work; all of them call what takes it, in the same order.

    Attributes:
        rank: this process.
        count: how many share the work.
        gather: exchanges a list of picklable objects: ``gather(mine)`` returns the lists of all, by rank.
        show_progress: with progress bars.
    """

    rank: int = 0
    count: int = 1
    gather: Gather = lambda mine: [mine]
    show_progress: bool = False

    def union(self, mine: Iterable) -> list:
        """Returns the sorted union of all processes' elements, the same on each of them."""
        if self.count == 1:
            return sorted(set(mine))
        return sorted({element for part in self.gather(list(mine)) for element in part})

    def share(self, everything: Sequence) -> Sequence:
        """Returns this process's part of a list that all have."""
        return everything[self.rank :: self.count]

    def together(self, mine: Iterable) -> list:
        """Returns the elements of all processes, by rank."""
        return [element for part in self.gather(list(mine)) for element in part]


ALONE = Sharing()
