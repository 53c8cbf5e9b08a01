import threading
import time
from collections.abc import Iterator

import pytest

from library.data.prefetch import prefetch


def _reader_threads() -> int:
    return sum(thread.name.startswith("reader") for thread in threading.enumerate())


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_results_come_in_order(num_threads: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.003 * (number % 3))
        return number * number

    assert list(prefetch(range(20), work, num_threads)) == [number * number for number in range(20)]
    assert _reader_threads() == 0


def test_no_more_than_depth_results_are_made_ahead() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = prefetch(jobs(), lambda number: number, 2, depth=3)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(taken) == 3
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_surfaces_in_its_turn(num_threads: int) -> None:
    def work(number: int) -> int:
        if number == 2:
            raise KeyError("picture 2")
        return number

    results = prefetch(range(5), work, num_threads)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="picture 2"):
        next(results)
    assert _reader_threads() == 0


def test_threads_end_when_the_generator_is_dropped() -> None:
    results = prefetch(range(1000), lambda number: number, 3)
    next(results)
    assert _reader_threads() > 0
    del results
    assert _reader_threads() == 0
