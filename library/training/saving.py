"""What is saved when, under which name, and which older files go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from library.errors import UserError
from library.files import remove_folder
from library.training.output_files import LoraNames, companion
from library.training.output_settings import OutputSettings, StateSettings
from library.training.state import StateNames

logger = logging.getLogger(__name__)

Write = Callable[[Path, int, int], None]
"""(file, step, epoch): writes the network with its metadata, and its moving average beside it where there is one."""
WriteState = Callable[[Path, bool], None]
"""(folder, events_done): writes a training state; whether the events of an epoch that ends here are done."""


class Uploads(Protocol):
    """Where saved files go besides."""

    def file(self, path: Path, wait: bool = False) -> None:
        """Uploads a file."""

    def state(self, folder: Path, wait: bool = False) -> None:
        """Uploads a state, where states are uploaded."""


class _NoUploads:
    def file(self, path: Path, wait: bool = False) -> None:
        pass

    def state(self, folder: Path, wait: bool = False) -> None:
        pass


class Saver:
    """Writes the LoRA at the epochs and steps that the settings name, and removes what they no longer keep.

    File names are sd-scripts': ``name-000002.safetensors`` after epoch 2, ``name-step00000100.safetensors`` after step
    100, ``name.safetensors`` at the end. Training states have the same names with ``-state`` behind them.

    A file or state that cannot be written on the way is a warning: the training is worth more. The last one is tried
    under another name too, and is an error in the end.
    """

    def __init__(
        self,
        settings: OutputSettings,
        num_epochs: int,
        write: Write,
        states: StateSettings | None = None,
        write_state: WriteState | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        """Prepares saving.

        Args:
            settings: folder, names, when to save and what to keep.
            num_epochs: epochs of the run; the last one's file is the final file.
            write: writes one file.
            states: whether training states are written, and which are kept.
            write_state: writes one state.
            uploads: gets every file and state that was written.
        """
        if settings.output_dir is None:  # OutputSettings refuses that; stated for the type checker
            raise ValueError("output_dir is missing")
        self._folder = settings.output_dir
        self._settings = settings
        self._num_epochs = num_epochs
        self._write = write
        self._states = states or StateSettings()
        self._write_state = write_state
        self._uploads = uploads or _NoUploads()
        self._names = LoraNames(self._folder, settings.output_name, settings.save_model_as)
        self._state_names = StateNames(self._folder, settings.output_name)
        self._every_epochs = settings.epochs_between_files(num_epochs)

    # The LoRA

    def is_step(self, step: int) -> bool:
        """Whether files are saved after this step."""
        every = self._settings.save_every_n_steps
        return bool(every) and step % every == 0  # type: ignore[operator]

    def is_epoch(self, epoch: int) -> bool:
        """Whether files are saved after this epoch, counted from 1."""
        return bool(self._every_epochs) and epoch % self._every_epochs == 0 and epoch < self._num_epochs  # type: ignore

    def after_step(self, step: int, epoch: int) -> None:
        """Saves if this step is one of ``--save_every_n_steps``; ``epoch`` is the number of finished epochs."""
        if not self.is_step(step):
            return
        self._save_or_warn(self._names.of_step(step), step, epoch)
        old = self._old_step(step, self._settings.save_last_n_steps)
        if old > 0:
            self._remove(self._names.of_step(old))

    def after_epoch(self, epoch: int, step: int) -> None:
        """Saves if this epoch, counted from 1, is one of ``--save_every_n_epochs``; the last one is the final file."""
        if not self.is_epoch(epoch):
            return
        self._save_or_warn(self._names.of_epoch(epoch), step, epoch)
        old = self._old_epoch(epoch, self._settings.save_last_n_epochs)
        if old > 0:
            self._remove(self._names.of_epoch(old))

    def at_end(self, step: int, epoch: int) -> Path:
        """Saves the final file, and the state where asked for; returns the file's path.

        Raises:
            UserError: the file cannot be written, also under another name.
        """
        # Uploads come last: what is on the disk is safe, and the network may let us wait.
        saved = self._save(self._names.final(), step, epoch, is_last=True)
        final = self._state_names.final()
        has_state = self._states.save_state or self._states.save_state_on_train_end
        has_state = has_state and self._write_state_or_warn(final, events_done=True)
        self._upload(saved, wait=True)
        if has_state:
            self._uploads.state(final, wait=True)
        return saved[-1]

    def at_interrupt(self, step: int, epoch: int, is_whole: bool = True) -> None:
        """Saves what has been trained so far under the step's name, where a run ends before its time.

        Args:
            step: the last one that was taken.
            epoch: finished epochs.
            is_whole: False where the run broke off inside of an update, which no state can continue.
        """
        self._uploads = _NoUploads()  # who ends a run does not want to wait for the network
        try:
            self._save_or_warn(self._names.of_step(step), step, epoch)
        except UserError as error:  # the run already ends with an error; this one is not its reason
            logger.warning("%s", error)
        if self._states.save_state and is_whole:
            self._save_state(self._state_names.of_step(step), events_done=False)

    def _old_step(self, step: int, keep: int | None) -> int:
        """Returns the newest step whose file goes when ``step`` has been saved, 0 or less where none does.

        ``--save_last_n_steps`` keeps the files of the last N steps, as in sd-scripts, not the last N files.
        """
        if keep is None:
            return 0
        old = step - keep - 1
        return old - old % (self._settings.save_every_n_steps or 1)

    def _old_epoch(self, epoch: int, keep: int | None) -> int:
        return 0 if keep is None else epoch - (self._every_epochs or 1) * keep

    def _save_or_warn(self, path: Path, step: int, epoch: int) -> None:
        try:
            self._upload(self._save(path, step, epoch, is_last=False))
        except OSError as error:
            logger.warning("%s is not saved (%s); training goes on without it", path.name, error)

    def _upload(self, files: list[Path], wait: bool = False) -> None:
        for file in files:
            self._uploads.file(file, wait)

    def _save(self, path: Path, step: int, epoch: int, is_last: bool) -> list[Path]:
        """Writes the file, under another name where that one cannot be written.

        Returns:
            The moving average's file, where one was written beside it, and its path.

        Raises:
            UserError: neither can be written, and it is the last file.
            OSError: neither can be written, and it is not.
        """
        average_before = _changed_at(companion(path))
        try:
            self._write(path, step, epoch)
        except OSError as error:
            other = path.with_name(f"{path.stem}-{time.strftime('%Y%m%d%H%M%S')}{path.suffix}")
            logger.warning("%s cannot be written (%s); trying %s", path, error, other.name)
            try:
                self._write(other, step, epoch)
            except OSError as second:
                if not is_last:
                    raise
                raise UserError(
                    f"--output_dir: nothing can be written to {self._folder} ({second}); free some space there or give"
                    " another folder"
                ) from second
            path, average_before = other, None
        logger.info("Saved %s", path)
        has_average = _changed_at(companion(path)) != average_before
        return [companion(path), path] if has_average else [path]

    def _remove(self, path: Path) -> None:
        for old in (path, companion(path)):
            if not old.exists():
                continue
            try:
                old.unlink()
            except OSError as error:
                logger.warning("The old file %s cannot be removed: %s", old.name, error)
            else:
                logger.info("Removed %s (only the newest are kept)", old.name)

    # Training states: the last thing that happens after a step or an epoch, so that nothing is left out by a resumed run

    def state_after_step(self, step: int) -> None:
        """Saves the state with ``--save_state`` if the LoRA was saved after this step."""
        if not self._states.save_state or not self.is_step(step):
            return
        self._save_state(self._state_names.of_step(step), events_done=False)
        keep = self._states.save_last_n_steps_state or self._settings.save_last_n_steps
        self._remove_states(self._state_names.steps(), self._old_step(step, keep))

    def state_after_epoch(self, epoch: int) -> None:
        """Saves the state with ``--save_state`` if the LoRA was saved after this epoch, counted from 1."""
        if not self._states.save_state or not self.is_epoch(epoch):
            return
        self._save_state(self._state_names.of_epoch(epoch), events_done=True)
        keep = self._states.save_last_n_epochs_state or self._settings.save_last_n_epochs
        self._remove_states(self._state_names.epochs(), self._old_epoch(epoch, keep))

    def _save_state(self, folder: Path, events_done: bool) -> None:
        if self._write_state_or_warn(folder, events_done):
            self._uploads.state(folder)

    def _write_state_or_warn(self, folder: Path, events_done: bool) -> bool:
        """Writes a state and returns whether it could be written."""
        if self._write_state is None:
            return False
        try:
            self._write_state(folder, events_done)
        except (OSError, TypeError) as error:  # a full disk, or an optimizer that remembers what no file can hold
            logger.warning("The training state %s is not saved: %s", folder.name, error)
            return False
        logger.info("Saved the training state %s", folder)
        return True

    def _remove_states(self, states: dict[int, Path], newest_to_go: int) -> None:
        """Removes all that are too old: a run that was killed may have left more than one."""
        for number, path in states.items():
            if number <= newest_to_go:
                try:
                    remove_folder(path)
                except OSError as error:
                    logger.warning("The old training state %s cannot be removed: %s", path.name, error)
                else:
                    logger.info("Removed %s (only the newest are kept)", path.name)


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None
