"""Says while a person waits that code is being compiled, and how long each piece took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_WORTH_TELLING_S = 1.0


class CompileReport:
    """Counts pieces of compiled code and tells of those that somebody waited for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = 0.0
        self._count = 0

    def begin(self, _: object = None) -> None:
        """A piece of code begins to be compiled."""
        self._started = self._clock()

    def end(self, _: object = None) -> None:
        """The piece is compiled, or found in torch's cache."""
        seconds = self._clock() - self._started
        self._count += 1
        if seconds >= _WORTH_TELLING_S:
            logger.info("Compiled piece %d of the blocks' code in %.0f s", self._count, seconds)


def report_compiling() -> None:
    """Has every later compilation of this process reported; a second call changes nothing."""
    # Takes a second, which only runs that compile should wait.
    from torch._dynamo.callback import callback_handler

    if any(isinstance(getattr(known, "__self__", None), CompileReport) for known in callback_handler.end_callbacks):
        return
    report = CompileReport()
    callback_handler.register_start_callback(report.begin)
    callback_handler.register_end_callback(report.end)
