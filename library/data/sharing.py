"""How processes share work whose result all of them need, and one progress bar over the work of all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

Gather = Callable[[list[Any]], list[list[Any]]]
Tally = Callable[[int], int]
"""Adds to a number that begins at 0 and that all processes share, and returns what it is now; never waits for them."""

Result = TypeVar("Result")

_BETWEEN_TALLIES_S = 0.25  # a tally is a question to the first process, small pieces of work are quicker
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.01, 0.25
_STALLED_S = 60.0


@dataclass(frozen=True)
class Sharing:
    """How processes share a piece of work; all of them call what takes it, in the same order.

    Attributes:
        rank: this process.
        count: how many share the work.
        gather: exchanges a list of picklable objects: ``gather(mine)`` returns the lists of all, by rank.
        show_progress: with progress bars.
        new_tally: begins a tally, each time another one; ``None``: progress bars know of this process alone.
    """

    rank: int = 0
    count: int = 1
    gather: Gather = lambda mine: [mine]
    show_progress: bool = False
    new_tally: Callable[[], Tally] | None = None

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

    def bar(self, total: int, what: str, unit: str) -> SharedBar:
        """Returns a progress bar over the work of all processes; nothing is shown where there is none to do.

        Args:
            total: pieces of work of all processes, the same number on each.
            what: is done.
            unit: what a piece is.
        """
        return SharedBar(self, total, what, unit)


class SharedBar:
    """A progress bar that counts what all processes have done; used as a context manager by each of them.

    The first process, which shows it, may be the first to end its part: it stays in the block until the others have left
    theirs, so that the bar goes on. A process that leaves by an exception counts as well, and where nothing moves for a
    minute the first one goes on and meets the others where it would without a bar.
    """

    def __init__(self, sharing: Sharing, total: int, what: str, unit: str) -> None:
        """Shows the bar, where there is work and this process shows progress; see :meth:`Sharing.bar`."""
        self._count = sharing.count
        self._is_shown = sharing.show_progress and total > 0
        self._bar = tqdm(total=total, desc=what, unit=unit, disable=not self._is_shown)
        self._untold = 0
        self._told_at = -math.inf
        self._done: Tally | None = None
        self._ended: Tally | None = None
        if sharing.count > 1 and sharing.new_tally is not None and total > 0:
            self._done, self._ended = sharing.new_tally(), sharing.new_tally()

    def update(self, number: int = 1) -> None:
        """Counts what this process has done."""
        if self._done is None:
            self._bar.update(number)
            return
        self._untold += number
        if time.monotonic() - self._told_at >= _BETWEEN_TALLIES_S:
            self._tell()

    def over(self, results: Iterable[Result]) -> Iterator[Result]:
        """Yields the results, counting each as one piece of work."""
        for result in results:
            yield result
            self.update()

    def __enter__(self) -> SharedBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._ended is not None:
                self._tell()
                ended = self._ended(1)
                if kind is None and self._is_shown:
                    self._show_others(self._ended, ended)
        finally:
            self._bar.close()

    def _tell(self) -> int:
        """Adds what has not been told yet, shows the number of all processes, and returns it."""
        if self._done is None:
            return 0
        number, self._untold = self._done(self._untold), 0
        self._told_at = time.monotonic()
        self._bar.update(number - self._bar.n)
        return number

    def _show_others(self, ended: Tally, num_ended: int) -> None:
        before, moved_at, pause = self._tell(), time.monotonic(), _FIRST_LOOK_S
        while num_ended < self._count and time.monotonic() - moved_at < _STALLED_S:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK_S)
            num_ended, number = ended(0), self._tell()
            if number != before:
                before, moved_at = number, time.monotonic()


ALONE = Sharing()
