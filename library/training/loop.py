"""The one loop over epochs and batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from library.data.dataset import Batch, TrainingData
from library.training.processes import Processes
from library.training.progress import Progress
from library.training.report import RunPlan
from library.training.step import TrainStep


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
    train_step: TrainStep
    progress: Progress
    processes: Processes
    events: Events


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs."""

    plan: RunPlan
    accumulation: int
    num_readers: int


class Loop:
    """Runs the epochs; ``step`` and ``finished_epochs`` say how far it came."""

    def __init__(self, parts: LoopParts, settings: LoopSettings) -> None:
        self.parts = parts
        self.settings = settings
        self.step = 0
        self.finished_epochs = 0

    def run(self) -> None:
        """Trains until the last step.

        Raises:
            UserError: the loss is no number any more.
        """
        plan, parts = self.settings.plan, self.parts
        with parts.progress.shown(self.step):
            for epoch in range(1, plan.num_epochs + 1):
                for batches, num_samples in self._steps_of(epoch):
                    values = parts.train_step(batches, num_samples, self.step + 1)
                    self.step += 1
                    parts.progress.after_step(values, epoch, num_samples)
                    parts.events.after_step(self.step, epoch, values)
                    if self.step >= plan.num_steps:
                        break
                self.finished_epochs = epoch
                parts.events.after_epoch(epoch, self.step, parts.progress.after_epoch())
                if self.step >= plan.num_steps:
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
