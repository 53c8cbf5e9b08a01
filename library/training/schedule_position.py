"""A learning rate's schedule at a step, where it cannot be taken from a training state because it has changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class GroupValues:
    """What an optimizer's groups held when it was new, besides their parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        for group in self._groups:
            group["lr"] = group.get("initial_lr", group["lr"])  # a schedule with a warm-up has lowered it already

    def put_back(self, names: Iterable[str]) -> None:
        """Sets these values of all groups to what they were, where a loaded state has overwritten them."""
        for group, fresh in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update({name: fresh[name] for name in names if name in fresh})


def schedule_after(make: Callable[[], LRScheduler], num_steps: int) -> LRScheduler:
    """Returns a schedule made anew, as it is after ``num_steps`` steps."""
    scheduler = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has not stepped
        for _ in range(num_steps):
            scheduler.step()
    return scheduler
