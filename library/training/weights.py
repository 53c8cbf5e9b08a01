"""Which values the trained parameters have while they are saved, drawn with or validated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from library.console import uninterrupted
from library.training.ema import MovingAverage
from library.training.optimizers import switches_modes


class Weights:
    """The network's parameters outside of training steps."""

    def __init__(self, network: Any, optimizer: Optimizer, average: MovingAverage | None = None) -> None:
        """Looks at a network in training.

        Args:
            network: what is trained.
            optimizer: schedule-free ones train other values than those that are meant for use.
            average: moving average of the parameters, where one is kept.
        """
        self._network = network
        self._optimizer: Any = optimizer
        self._average = average
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @property
    def has_average(self) -> bool:
        """Whether there is a moving average (``--ema_decay``)."""
        return self._average is not None

    @contextlib.contextmanager
    def in_use(self, averaged: bool = False) -> Iterator[None]:
        """Puts the network into the state that it is used in: no dropout, and the values that are meant for use.

        Afterwards every parameter has exactly the bits that it had before: they are put back from a copy, because a
        schedule-free optimizer's way back rounds.

        Args:
            averaged: with the moving average of ``--ema_decay``.
        """
        if averaged and self._average is None:
            raise ValueError("there is no moving average")
        switches = switches_modes(self._optimizer)
        kept = [parameter.detach().clone() for parameter in self._parameters] if switches or averaged else []
        self._network.eval()
        try:
            if switches:
                with torch.no_grad():
                    self._optimizer.eval()
            if averaged and self._average is not None:
                self._average.copy_to_parameters()
            yield
        finally:
            # Ctrl+C in here must not leave other values to be trained and saved.
            with uninterrupted(), torch.no_grad():
                if switches:
                    self._optimizer.train()
                if kept:
                    torch._foreach_copy_(self._parameters, kept)
            self._network.train()
