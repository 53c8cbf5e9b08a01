"""Work that one thread does behind the one who asks for it, such as writing what an encoder gave to disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class WriteBehind:
    """Does jobs in the order they come, in a thread, while the caller goes on; to be used in a ``with`` block.

    An exception of a job is raised by a later call, or where the block ends, and jobs that have not begun are dropped. The
    block ends when everything is done. Where it ends by an exception, Ctrl+C included, the job that has begun is
    finished and the others are dropped.
    """

    def __init__(self, depth: int = 4) -> None:
        """Starts.

        Args:
            depth: jobs that may wait or be under way; the caller waits where there are more.
        """
        self._depth = depth
        self._waiting: deque[Future[None]] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def __enter__(self) -> WriteBehind:
        return self

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Has ``job(*arguments)`` done."""
        while self._waiting and (len(self._waiting) >= self._depth or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._executor.submit(job, *arguments))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._executor.shutdown(wait=True, cancel_futures=True)
