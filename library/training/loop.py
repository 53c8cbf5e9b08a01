"""The one loop over epochs and batches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from library.console import is_stopped, uninterrupted
from library.data.dataset import TrainingData
from library.data.items import Batch
from library.training.processes import Processes
from library.training.progress import Progress
from library.training.report import RunPlan
from library.training.state import Position
from library.training.step import TrainStep


class Events(Protocol):
    """What happens around steps: saving, previews, reports."""

    def report(self, step: int, values: dict[str, float]) -> None:
        """Called after every optimizer step, also after the last one of a run that is interrupted."""

    def after_step(self, step: int) -> None:
        """Called after every optimizer step of a run that goes on."""

    def after_epoch(self, epoch: int, step: int, values: dict[str, float]) -> None:
        """Called after every epoch, counted from 1.

        Called again by a run that goes on from a state of an interrupt in here; ``values`` are empty then, because the
        epoch's averages have been taken, and what changes training itself must not be done twice.
        """


@dataclass
class LoopParts:
    """What the loop drives."""

    data: TrainingData
    train_step: TrainStep
    progress: Progress
    processes: Processes


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs."""

    plan: RunPlan
    accumulation: int
    num_readers: int


class Loop:
    """Runs the epochs from a position on; ``step`` and ``finished_epochs`` say how far it came."""

    def __init__(self, parts: LoopParts, settings: LoopSettings, start: Position | None = None) -> None:
        """Prepares the loop.

        Args:
            parts: what it drives.
            settings: how long it runs.
            start: where an earlier run stood; None for the beginning.
        """
        start = start or Position()
        self.parts = parts
        self.settings = settings
        self.step = start.step
        self.finished_epochs = start.finished_epochs
        self._epoch = start.epoch
        self._batch = start.batch

    @property
    def is_whole(self) -> bool:
        """Whether parameters and optimizer are those of :meth:`position`, and not half-updated."""
        return not self.parts.train_step.is_updating

    @property
    def is_at_end(self) -> bool:
        """Whether nothing is left to do, neither a step nor what happens at an epoch's end."""
        plan = self.settings.plan
        return self.step >= plan.num_steps and self._batch < plan.num_batches

    def position(self, events_done: bool = False) -> Position:
        """Returns where the run stands.

        Args:
            events_done: whether all that happens at the end of an epoch has happened, where one ends here.
        """
        if self._batch < self.settings.plan.num_batches:
            return Position(self.step, self._epoch, self._batch, self._epoch - 1)
        if events_done:
            return Position(self.step, self._epoch + 1, 0, self._epoch)
        return Position(self.step, self._epoch, self._batch, self.finished_epochs)

    def run(self, events: Events) -> None:
        """Trains until the last step.

        Args:
            events: told what has been done.

        Raises:
            UserError: the loss is no number any more.
            KeyboardInterrupt: the user stopped the program; all processes stop after the same step.
        """
        with self.parts.progress.shown(self.step):
            while not self.is_at_end:
                self._run_epoch(events)

    def _run_epoch(self, events: Events) -> None:
        plan, parts = self.settings.plan, self.parts
        if self._batch < plan.num_batches:
            self._run_steps(events)
        values = {}
        if self.finished_epochs < self._epoch:
            with uninterrupted():
                values = parts.progress.after_epoch()
                self.finished_epochs = self._epoch
        events.after_epoch(self._epoch, self.step, values)
        if self._batch >= plan.num_batches:
            self._epoch, self._batch = self._epoch + 1, 0

    def _run_steps(self, events: Events) -> None:
        """Runs what is left of the epoch."""
        parts = self.parts
        steps: Generator[tuple[list[Batch], int]] = self._steps_of(self._epoch, self._batch)
        try:
            while True:
                # A process that stopped alone would leave the others waiting for it.
                with uninterrupted() if parts.processes.count > 1 else contextlib.nullcontext():
                    batches, num_samples = next(steps, (None, 0))
                    values = None if batches is None else self._run_step(batches, num_samples)
                if values is None:
                    return
                events.report(self.step, values)
                if parts.train_step.is_stopped if parts.processes.count > 1 else is_stopped():
                    raise KeyboardInterrupt
                events.after_step(self.step)
                if self.step >= self.settings.plan.num_steps:
                    return
        finally:
            steps.close()

    def _run_step(self, batches: list[Batch], num_samples: int) -> dict[str, float]:
        with uninterrupted():  # half a step is worth nothing
            values = self.parts.train_step(batches, num_samples, self.step + 1)
            self.step += 1
            self._batch += len(batches)
            self.parts.progress.after_step(values, self._epoch, num_samples)
        return values

    def _steps_of(self, epoch: int, start: int) -> Generator[tuple[list[Batch], int]]:
        """Yields the batches of each optimizer step for this process, and the step's samples over all processes."""
        parts, processes = self.parts, self.parts.processes
        plan = parts.data.plan_epoch(epoch, processes.count)
        sizes = map(len, itertools.islice(plan.batches, start, None))
        readers = self.settings.num_readers
        batches = parts.data.batches(plan, processes.rank, processes.count, start=start, num_workers=readers)
        try:
            while sizes_of_step := list(itertools.islice(sizes, self.settings.accumulation)):
                yield list(itertools.islice(batches, len(sizes_of_step))), sum(sizes_of_step)
        finally:
            batches.close()
