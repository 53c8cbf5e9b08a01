"""A learning rate's schedule at a step, where it cannot be taken from a training state because it has changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.training.optimizers import goes_by_the_loss


class FreshValues:
    """What an optimizer's groups and its schedule held when they were new."""

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Remembers them; to be made before a state is loaded."""
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._schedule = copy.deepcopy(scheduler.state_dict())
        self._groups: list[dict[str, Any]] = [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def put_back(self, names: Iterable[str]) -> None:
        """Sets these values of all groups to what they were, where a loaded state has overwritten them."""
        names = tuple(names)
        for group, fresh in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update({name: fresh[name] for name in names if name in fresh})

    def move_schedule(self, num_steps: int) -> None:
        """Sets the learning rate to what the schedule, begun anew, gives after ``num_steps`` steps.

        A schedule that goes by the loss stays where it is: its rates do not follow from a number of steps.
        """
        scheduler = self._scheduler
        if goes_by_the_loss(scheduler):
            return
        self.put_back(("lr", "initial_lr"))
        scheduler.load_state_dict(self._schedule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has not stepped
            for _ in range(num_steps):
                scheduler.step()
