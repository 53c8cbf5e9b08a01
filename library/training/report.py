"""How long a run is, and what the log says of it before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.training.arguments import TrainConfig
from library.training.optimizer_names import sets_its_own_rate
from library.training.settings import ScheduleSettings

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.data.dataset import TrainingData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """Length of a run."""

    num_batches: int  # of an epoch, over all processes
    steps_per_epoch: int
    num_steps: int
    num_epochs: int

    @classmethod
    def of(cls, schedule: ScheduleSettings, num_batches: int) -> RunPlan:
        """Returns the length that the settings ask for; the last batches of an epoch make a step of their own."""
        steps_per_epoch = -(-num_batches // schedule.gradient_accumulation_steps)
        num_epochs, num_steps = schedule.max_train_epochs, schedule.max_train_steps
        if num_epochs is not None:
            return cls(num_batches, steps_per_epoch, num_epochs * steps_per_epoch, num_epochs)
        return cls(num_batches, steps_per_epoch, num_steps, -(-num_steps // steps_per_epoch))


def log_plan(
    config: TrainConfig,
    data: TrainingData,
    network: Any,
    optimizer: Optimizer,
    group_names: Sequence[str],
    plan: RunPlan,
) -> None:
    """Says what is trained on, for how long, which parts, and how fast."""
    from library.data.summary import summary_lines

    for line in summary_lines(data):
        logger.info("%s", line)
    accumulated = config.schedule.gradient_accumulation_steps
    logger.info(
        "Steps: %d in %d epoch%s (%d batches an epoch%s)",
        plan.num_steps,
        plan.num_epochs,
        "s" if plan.num_epochs > 1 else "",
        plan.num_batches,
        f", {accumulated} a step" if accumulated > 1 else "",
    )
    if hasattr(network, "describe"):
        for component, num_modules, ranks, num_parameters in network.describe():
            logger.info(
                "Trained: %s, %d module%s, rank %s, %s parameters",
                component,
                num_modules,
                "s" if num_modules > 1 else "",
                ranks,
                f"{num_parameters:,}",
            )
    total = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    rates = ", ".join(
        f"{name} {group['initial_lr']:g}" for name, group in zip(group_names, optimizer.param_groups, strict=True)
    )
    name = config.optimizer.resolved_optimizer
    if sets_its_own_rate(config.optimizer):
        rates = "set by the optimizer"
    logger.info("Optimizer: %s over %s parameters, learning rate %s", name, f"{total:,}", rates)
