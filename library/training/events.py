"""What happens around the steps of a run, in which order: reports, files, validation, previews, training states.

A training state is the last thing that is written, so that a run that is continued from it leaves nothing out. All
processes then wait for the one that wrote, and the time does not count as that of a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from library.console import uninterrupted
from library.training.loop import Loop
from library.training.previews import Previews
from library.training.saving import Saver
from library.training.trackers import Trackers
from library.training.updater import Updater
from library.training.validation import Validation

logger = logging.getLogger(__name__)


class RunEvents:
    """The events of a run; the loop tells what it has done (:class:`~library.training.loop.Events`)."""

    def __init__(
        self,
        loop: Loop,
        updater: Updater,
        trackers: Trackers,
        validation: Validation,
        previews: Previews,
        saver: Saver,
        put_autoencoder_away: Callable[[bool], None],
    ) -> None:
        """Looks at a loop that has not run yet.

        Args:
            loop: knows where the run stands.
            updater: is told what a schedule may go by.
            trackers: get every number.
            validation: measures when it is time.
            previews: draws when it is time.
            saver: writes when it is time, in the first process.
            put_autoencoder_away: called behind previews, whether they were drawn or not, with whether there was a step.
        """
        self._loop = loop
        self._progress = loop.parts.progress
        self._processes = loop.parts.processes
        self._plan = loop.settings.plan
        self._start = loop.step
        self._updater = updater
        self._trackers = trackers
        self._validation = validation
        self._previews = previews
        self._saver = saver
        self._put_autoencoder_away = put_autoencoder_away

    def _finished_epochs(self, step: int) -> int:
        return step // self._plan.steps_per_epoch

    def before_steps(self, is_continued: bool) -> None:
        """Draws before the first step of all, or makes up for a measurement that an interrupt came before.

        Args:
            is_continued: the run goes on from a training state of this very step.
        """
        step = self._loop.step
        if self._loop.is_at_end:
            logger.warning(
                "The run is at its end already (step %d of %d): nothing is left to train, and the final file is written"
                " again; a larger --max_train_steps or --max_train_epochs goes on",
                step,
                self._plan.num_steps,
            )
        if step == 0:
            self._previews.at_first()
            self._put_autoencoder_away(False)
        elif is_continued and self._updater.awaits_validation(step):
            # The run was interrupted between this step and a measurement that the learning rate goes by.
            self._trackers.log(self._validation.after_step(step, self._progress.average), step)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Reports what an optimizer step gave."""
        self._trackers.log(values, step)

    def after_step(self, step: int) -> None:
        """Saves, validates and draws after an optimizer step."""
        if self._processes.is_main:
            self._saver.after_step(step, self._finished_epochs(step))
        self._trackers.log(self._validation.after_step(step, self._progress.average), step)
        self._previews.after_step(step)
        self._put_autoencoder_away(True)
        if self._processes.is_main:
            self._saver.state_after_step(step)
        if self._saver.is_step(step):
            self._processes.wait()
        self._progress.leave_time_out()

    def after_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Reports, saves, validates and draws after an epoch."""
        if values:  # empty where the epoch's end was interrupted, and comes again; first, because it changes training
            self._updater.after_epoch(values["loss/epoch_average"])
        self._trackers.log(values, step)
        if self._processes.is_main:
            self._saver.after_epoch(epoch, step)
        self._trackers.log(self._validation.after_epoch(epoch, step, self._progress.average), step)
        self._previews.after_epoch(epoch, step)
        self._put_autoencoder_away(True)
        if self._processes.is_main:
            self._saver.state_after_epoch(epoch)
        if self._saver.is_epoch(epoch):
            self._processes.wait()
        self._progress.leave_time_out()

    def at_interrupt(self) -> None:
        """Saves what has been trained so far, where the run ends before its time."""
        step = self._loop.step
        if self._processes.is_main and step > self._start:
            # A launcher sends further signals to processes that it sees ending.
            with uninterrupted():
                self._saver.at_interrupt(step, self._finished_epochs(step), self._loop.is_whole)

    def at_end(self) -> None:
        """Writes the final file."""
        if self._processes.is_main:
            self._saver.at_end(self._loop.step, self._plan.num_epochs)
