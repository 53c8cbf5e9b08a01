"""One progress bar over the work of several processes."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from library.data import sharing as module
from library.data.sharing import SharedBar, Sharing, Tally


class Tallies:
    """Numbers that threads share as processes would; each process asks for its own, in the same order."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self._lock = threading.Lock()

    def of_process(self) -> Callable[[], Tally]:
        begun = iter(range(100))

        def new_tally() -> Tally:
            name = next(begun)

            def add(amount: int) -> int:
                with self._lock:
                    self.numbers[name] = self.numbers.get(name, 0) + amount
                    return self.numbers[name]

            return add

        return new_tally


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Bars that write to memory and stay readable."""
    bars: list[Any] = []

    class Bar(module.tqdm):  # type: ignore[misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(file=io.StringIO(), **settings)
            bars.append(self)

    monkeypatch.setattr(module, "tqdm", Bar)
    return bars


def bar_of(rank: int, count: int, total: int, tallies: Tallies | None) -> SharedBar:
    new_tally = tallies.of_process() if tallies else None
    return Sharing(rank, count, show_progress=rank == 0, new_tally=new_tally).bar(total, "working", "piece")


def test_one_process_counts_its_own_work(shown: list[Any]) -> None:
    with bar_of(0, 1, 3, None) as bar:
        assert list(bar.over("abc")) == ["a", "b", "c"]
        bar.update(0)
    assert (shown[0].n, shown[0].total) == (3, 3)


def test_the_first_process_shows_the_work_of_all_and_waits_for_the_others(shown: list[Any]) -> None:
    tallies = Tallies()
    seen: list[int] = []

    def second() -> None:
        with bar_of(1, 2, 7, tallies) as other:
            for _ in range(4):
                time.sleep(0.3)
                seen.append(shown[0].n)
                other.update()

    with bar_of(0, 2, 7, tallies) as bar:
        thread = threading.Thread(target=second)
        thread.start()
        bar.update(3)
    thread.join()
    assert (shown[0].n, shown[0].total) == (7, 7)
    assert seen[0] == 3
    assert seen == sorted(seen)
    assert seen[-1] > 3  # the bar went on after the first process's own part


def test_an_error_of_one_process_lets_the_first_one_go_on(shown: list[Any]) -> None:
    tallies = Tallies()

    def fails() -> None:
        with bar_of(1, 2, 7, tallies) as other:
            other.update()
            raise ValueError("broken")

    with bar_of(0, 2, 7, tallies) as bar:
        bar.update(3)
        with pytest.raises(ValueError, match="broken"):
            fails()
    assert shown[0].n == 4


def test_the_first_process_does_not_wait_behind_its_own_error(shown: list[Any]) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="mine"), bar_of(0, 2, 7, Tallies()):
        raise ValueError("mine")
    assert time.monotonic() - started < 5  # a wait would last a minute


def test_a_process_that_died_is_not_waited_for_without_end(shown: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STALLED_S", 0.3)
    with bar_of(0, 2, 7, Tallies()) as bar:
        bar.update(3)
    assert shown[0].n == 3


def test_work_of_nobody_is_neither_shown_nor_told(shown: list[Any]) -> None:
    tallies = Tallies()
    with bar_of(0, 2, 0, tallies):
        pass
    assert shown[0].disable
    assert tallies.numbers == {}


def test_many_small_pieces_are_told_seldom(shown: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BETWEEN_TALLIES_S", 3600.0)
    told: list[int] = []

    def tally(amount: int) -> int:
        told.append(amount)
        return sum(told)

    bar = Sharing(1, 2, new_tally=lambda: tally).bar(1000, "working", "piece")
    with bar:
        for _ in range(1000):
            bar.update()
    assert told == [1, 999, 1]  # at once, at the end, and that this process has ended
