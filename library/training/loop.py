"""The one loop over epochs and batches: gradients of a step's batches, optimizer, schedule, numbers.

The loss of an optimizer step is the mean over all its samples, in all batches and processes: each batch's loss is
divided by the number of samples of the whole step, and gradients are added up. So neither the number of processes nor
short last batches change what a sample weighs.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from library.console import raise_if_stopped
from library.data.dataset import Batch, TrainingData
from library.training.optimizers import clip_gradients
from library.training.processes import Processes, check_finite
from library.training.report import RunPlan

logger = logging.getLogger(__name__)


class Events(Protocol):
    """What happens around steps: saving, previews, reports."""

    def after_step(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Called after every optimizer step; ``epoch`` counts from 1 and is the running one."""

    def after_epoch(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Called after every epoch, counted from 1."""


@dataclass
class LoopParts:
    """What the loop drives."""

    data: TrainingData
    network: Any
    optimizer: Optimizer
    scheduler: LRScheduler
    group_names: Sequence[str]
    losses_of: Callable[[Batch], Tensor]  # -> (B,) float32, one loss a sample, with gradients
    processes: Processes
    events: Events


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs."""

    plan: RunPlan
    accumulation: int
    max_grad_norm: float
    scale_weight_norms: float | None
    num_readers: int


class Loop:
    """Runs the epochs; ``step`` and ``epoch`` say how far it came."""

    def __init__(self, parts: LoopParts, settings: LoopSettings) -> None:
        self.parts = parts
        self.settings = settings
        self.step = 0
        self.finished_epochs = 0
        self._parameters: list[torch.nn.Parameter] = [
            parameter for group in parts.optimizer.param_groups for parameter in group["params"]
        ]

    def run(self) -> None:
        """Trains until the last step.

        Raises:
            UserError: the loss is no number any more.
        """
        settings, events = self.settings, self.parts.events
        bar = tqdm(
            total=settings.plan.num_steps, desc="steps", disable=not self.parts.processes.is_main, smoothing=0.05
        )
        recent: deque[float] = deque(maxlen=settings.plan.steps_per_epoch)
        with bar:
            for epoch in range(1, settings.plan.num_epochs + 1):
                epoch_losses: list[float] = []
                for batches, num_samples in self._steps_of(epoch):
                    values = self._train_step(batches, num_samples)
                    recent.append(values["loss/current"])
                    epoch_losses.append(values["loss/current"])
                    values["loss/average"] = sum(recent) / len(recent)
                    bar.update()
                    bar.set_postfix(
                        avr_loss=f"{values['loss/average']:.4f}", epoch=f"{epoch}/{settings.plan.num_epochs}"
                    )
                    events.after_step(self.step, epoch, values)
                    if self.step >= settings.plan.num_steps:
                        break
                self.finished_epochs = epoch
                mean = {"loss/epoch_average": sum(epoch_losses) / len(epoch_losses)}
                events.after_epoch(epoch, self.step, mean)
                if self.step >= settings.plan.num_steps:
                    return

    def _steps_of(self, epoch: int) -> Iterator[tuple[list[Batch], int]]:
        """Yields the batches of each optimizer step for this process, and the step's samples over all processes."""
        parts, processes = self.parts, self.parts.processes
        plan = parts.data.plan_epoch(epoch, processes.count)
        sizes = map(len, plan.batches)
        batches = parts.data.batches(plan, processes.rank, processes.count, num_workers=self.settings.num_readers)
        try:
            while sizes_of_step := list(itertools.islice(sizes, self.settings.accumulation)):
                yield list(itertools.islice(batches, len(sizes_of_step))), sum(sizes_of_step)
        finally:
            batches.close()

    def _train_step(self, batches: Sequence[Batch], num_samples: int) -> dict[str, float]:
        parts, settings = self.parts, self.settings
        raise_if_stopped()
        step_loss = torch.zeros((), device=self._parameters[0].device)
        for batch in batches:
            if not batch.draws:  # fewer samples than processes: this one has none
                continue
            losses = parts.losses_of(batch)
            loss = (losses * batch.loss_weights.to(losses.device)).sum() / num_samples
            loss.backward()
            step_loss += loss.detach()
        step_loss = parts.processes.add_up(self._parameters, step_loss)
        gradient_norm = clip_gradients(self._parameters, settings.max_grad_norm)
        # One wait for the device, not two.
        loss_value, norm_value = torch.stack([step_loss.float(), gradient_norm.float()]).tolist()
        names = [draw.item.path.name for batch in batches for draw in batch.draws]
        check_finite(loss_value, norm_value, self.step + 1, names)
        rates = {name: float(rate) for name, rate in zip(parts.group_names, parts.scheduler.get_last_lr(), strict=True)}
        parts.optimizer.step()
        parts.scheduler.step()
        parts.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        values = {"loss/current": loss_value, "norm/gradient": norm_value}
        values.update({f"lr/{name}": rate for name, rate in rates.items()})
        if settings.scale_weight_norms is not None:
            scaled, mean, largest = parts.network.apply_max_norm_regularization(
                settings.scale_weight_norms, self._parameters[0].device
            )
            values.update({"max_norm/keys_scaled": scaled, "norm/avg_key_norm": mean, "max_norm/max_key_norm": largest})
        return values
