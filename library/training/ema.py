"""The moving average of the trained parameters (``--ema_decay``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage:
    """An exponential moving average in float32, on the parameters' device.

    After step t (counted from 1) the average moves by ``1 - min(decay, t / (9 + t))`` of the way to the parameters: it
    follows them closely at first, so that the values that training started from are soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        """Starts with the parameters as they are.

        Args:
            parameters: everything that is trained.
            decay: share of the average that stays at each step, once it has warmed up.
        """
        self.decay = decay
        self._parameters: list[Tensor] = list(parameters)
        self._num_updates = 0
        self._averages = self._copies()

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().to(torch.float32, copy=True) for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the parameters; called after every optimizer step."""
        self._num_updates += 1
        decay = min(self.decay, self._num_updates / (9 + self._num_updates))
        current = [parameter.detach().float() for parameter in self._parameters]
        torch._foreach_lerp_(self._averages, current, 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Puts the average into the parameters."""
        torch._foreach_copy_(self._parameters, self._averages)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a later run needs to go on exactly."""
        return {
            "num_updates": self._num_updates,
            "averages": [average.to("cpu", copy=True) for average in self._averages],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on from a state of the same parameters; from the parameters as they are where there is none."""
        if state is None:
            self._num_updates, self._averages = 0, self._copies()
            return
        self._num_updates = int(state["num_updates"])
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
