"""Work that threads do ahead of the one who needs it.

Threads, not processes: decoding and resizing release Python's lock, nothing is copied between processes, and there is
no start-up cost at each epoch and no difference between operating systems.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def prefetch(
    jobs: Iterable[Job], work: Callable[[Job], Result], num_threads: int, depth: int | None = None
) -> Generator[Result]:
    """Yields ``work(job)`` for each job, in order, computed ahead by threads.

    An exception of ``work`` is raised here, in its turn. When the generator is closed or dropped, jobs that have not
    begun are cancelled and the threads end.

    Args:
        jobs: read only as far as needed.
        work: called in the threads.
        num_threads: 0 computes each result when it is asked for, without threads.
        depth: how many results may wait or be under way (default: two per thread).
    """
    if num_threads <= 0:
        yield from map(work, jobs)
        return
    limit = depth or 2 * num_threads
    waiting: deque[Future[Result]] = deque()
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")
    try:
        for job in jobs:
            waiting.append(executor.submit(work, job))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
