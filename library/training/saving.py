"""What is saved when, under which name, and which older files go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from library.errors import UserError
from library.training.ema import companion
from library.training.output_settings import OutputSettings

logger = logging.getLogger(__name__)

Write = Callable[[Path, int, int], None]
"""(file, step, epoch): writes the network with its metadata."""


class Saver:
    """Writes the LoRA at the epochs and steps that the settings name, and removes what they no longer keep.

    File names are sd-scripts': ``name-000002.safetensors`` after epoch 2, ``name-step00000100.safetensors`` after step
    100, ``name.safetensors`` at the end.
    """

    def __init__(self, settings: OutputSettings, num_epochs: int, write: Write) -> None:
        """Prepares saving.

        Args:
            settings: folder, names, when to save and what to keep.
            num_epochs: epochs of the run; the last one's file is the final file.
            write: writes one file.
        """
        if settings.output_dir is None:  # OutputSettings refuses that; stated for the type checker
            raise ValueError("output_dir is missing")
        self._folder = settings.output_dir
        self._settings = settings
        self._num_epochs = num_epochs
        self._write = write
        self._every_epochs = settings.save_every_n_epochs
        if settings.save_n_epoch_ratio:
            self._every_epochs = max(1, num_epochs // settings.save_n_epoch_ratio)

    def _path(self, suffix: str, nameless: str) -> Path:
        name = f"{self._settings.output_name or nameless}{suffix}.{self._settings.save_model_as}"
        return self._folder / name

    def epoch_path(self, epoch: int) -> Path:
        """Returns the file of an epoch, counted from 1."""
        return self._path(f"-{epoch:06d}", "epoch")

    def step_path(self, step: int) -> Path:
        """Returns the file of a step, counted from 1."""
        return self._path(f"-step{step:08d}", "at")

    def final_path(self) -> Path:
        """Returns the file of the whole run."""
        return self._path("", "last")

    def after_step(self, step: int, epoch: int) -> None:
        """Saves if this step is one of ``--save_every_n_steps``; ``epoch`` is the number of finished epochs."""
        every = self._settings.save_every_n_steps
        if not every or step % every:
            return
        self._save(self.step_path(step), step, epoch)
        if self._settings.save_last_n_steps is not None:
            old = step - self._settings.save_last_n_steps - 1
            old -= old % every
            if old > 0:
                self._remove(self.step_path(old))

    def after_epoch(self, epoch: int, step: int) -> None:
        """Saves if this epoch, counted from 1, is one of ``--save_every_n_epochs``; the last one is the final file."""
        if not self._every_epochs or epoch % self._every_epochs or epoch >= self._num_epochs:
            return
        self._save(self.epoch_path(epoch), step, epoch)
        if self._settings.save_last_n_epochs is not None:
            old = epoch - self._every_epochs * self._settings.save_last_n_epochs
            if old > 0:
                self._remove(self.epoch_path(old))

    def at_end(self, step: int, epoch: int) -> Path:
        """Saves the final file and returns its path."""
        return self._save(self.final_path(), step, epoch)

    def at_interrupt(self, step: int, epoch: int) -> None:
        """Saves what has been trained so far under the step's name, where a run ends before its time."""
        self._save(self.step_path(step), step, epoch)

    def _save(self, path: Path, step: int, epoch: int) -> Path:
        """Writes the file, under another name where that one cannot be written, and returns its path.

        Raises:
            UserError: neither can be written.
        """
        try:
            self._write(path, step, epoch)
        except OSError as error:
            other = path.with_name(f"{path.stem}-{time.strftime('%Y%m%d%H%M%S')}{path.suffix}")
            logger.warning("%s cannot be written (%s); trying %s", path, error, other.name)
            try:
                self._write(other, step, epoch)
            except OSError as second:
                raise UserError(
                    f"--output_dir: nothing can be written to {self._folder} ({second}); free some space there or give"
                    " another folder"
                ) from second
            path = other
        logger.info("Saved %s", path)
        return path

    def _remove(self, path: Path) -> None:
        for file in (path, companion(path)):
            if file.exists():
                file.unlink()
                logger.info("Removed %s (only the newest are kept)", file.name)
