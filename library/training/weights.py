"""Which values the trained parameters have while they are saved, drawn with or validated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer


class Weights:
    """The network's parameters outside of training steps."""

    def __init__(self, network: Any, optimizer: Optimizer) -> None:
        self._network = network
        self._optimizer = optimizer

    @contextlib.contextmanager
    def in_use(self, averaged: bool = False) -> Iterator[None]:
        """Puts the network into the state that it is used in: no dropout, and the values that are meant for use.

        Afterwards every parameter has exactly the bits that it had before.

        Args:
            averaged: with the moving average of ``--ema_decay``.
        """
        self._network.eval()
        try:
            yield
        finally:
            self._network.train()
