"""Pictures drawn while training: when, in which batches, under which names, by which process."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.contact_sheet import Entry, contact_sheet, note_of, save_sheet
from library.errors import DrawingError
from library.keyed_random import key
from library.picture_text import DrawnWith, picture_text, save_png
from library.prompts import Prompt, batches_of
from library.shortage import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.training.processes import Processes
    from library.training.settings import SampleSettings
    from library.training.trackers import Trackers

logger = logging.getLogger(__name__)

Draw = Callable[[Sequence[Prompt], Sequence[int]], "list[Image]"]
"""(prompts of one size and set of options, their seeds) -> RGB pictures."""

SHEET_NAME = "sample_sheet"


class Previews:
    """Draws the sample prompts at the times that the settings name.

    Files go to ``sample/`` in the output folder under sd-scripts' names, and beside them a sheet with all pictures of the
    moment. A prompt without a seed gets one from the run's seed and its place, the same at every event, so that pictures
    of different epochs can be compared.
    """

    def __init__(
        self,
        settings: SampleSettings,
        prompts: Sequence[Prompt],
        seed: int,
        folder: Path,
        output_name: str | None,
        processes: Processes,
        trackers: Trackers,
        draw: Draw,
        how: DrawnWith,
        batch_size: int = 1,
    ) -> None:
        """Plans the previews.

        Args:
            settings: when to draw.
            prompts: what to draw.
            seed: of the run.
            folder: the run's output folder.
            output_name: begins the files' names.
            processes: that share the drawing.
            trackers: that get the pictures too.
            draw: draws one batch.
            how: it draws, for the files' texts.
            batch_size: prompts drawn at a time where ``--sample_batch_size`` is left out.
        """
        self._settings = settings
        self._prompts = prompts
        self._seeds = [
            key("preview", seed, index) % 2**32 if prompt.seed is None else prompt.seed
            for index, prompt in enumerate(prompts)
        ]
        self._batches = batches_of(prompts, settings.sample_batch_size or batch_size, processes.count)
        self._folder = folder / "sample"
        self._output_name = output_name or ""
        self._processes = processes
        self._trackers = trackers
        self._draw = draw
        self._how = how

    def at_first(self) -> None:
        """Draws before the first step, where asked for."""
        if self._settings.sample_at_first:
            self._draw_all("e000000", 0, "before training")

    def after_step(self, step: int) -> None:
        """Draws after a step, where asked for; ``--sample_every_n_epochs`` goes before ``--sample_every_n_steps``."""
        every = self._settings.sample_every_n_steps
        if every and not self._settings.sample_every_n_epochs and step % every == 0:
            self._draw_all(f"{step:06d}", step, f"step {step}")

    def after_epoch(self, epoch: int, step: int) -> None:
        """Draws after an epoch, where asked for."""
        every = self._settings.sample_every_n_epochs
        if every and epoch % every == 0:
            self._draw_all(f"e{epoch:06d}", step, f"epoch {epoch}, step {step}")

    def _draw_all(self, moment: str, step: int, title: str) -> None:
        if not self._prompts:
            return
        start = f"{self._output_name}_{moment}" if self._output_name else moment
        now = time.strftime("%Y%m%d%H%M%S")
        drawn: list[tuple[int, Image]] = []
        for batch in self._batches[self._processes.rank :: self._processes.count]:
            drawn += self._draw_batch(batch)
        how = dataclasses.replace(self._how, further=(("Training", title),))
        for index, picture in drawn:
            given = "" if self._prompts[index].seed is None else f"_{self._seeds[index]}"
            text = picture_text(self._prompts[index], self._seeds[index], how)
            self._write(f"{start}_{index:02d}_{now}{given}.png", partial(save_png, picture=picture, text=text))
        if self._processes.on_cuda:
            torch.cuda.empty_cache()  # what the autoencoder needed is much, and training needs it for itself
        gathered = [entry for part in self._processes.gather(drawn) for entry in part]
        pictures = sorted(gathered, key=lambda entry: entry[0])
        for index, picture in pictures:
            self._trackers.log_picture(f"sample_{index}", picture, step)
        if pictures and self._processes.rank == 0:
            notes = {index: f"{index}: {note_of(self._prompts[index], self._seeds[index])}" for index, _ in pictures}
            entries = [Entry(picture, self._prompts[index].prompt, notes[index]) for index, picture in pictures]
            sheet = contact_sheet(entries, f"{self._output_name} {title}".strip())
            self._write(f"{start}_sheet_{now}.jpg", partial(save_sheet, sheet=sheet))
            self._trackers.log_picture(SHEET_NAME, sheet, step)
        logger.info("Drew %d pictures to %s", len(pictures), self._folder)

    def _draw_batch(self, indexes: Sequence[int]) -> list[tuple[int, Image]]:
        """Returns the pictures, without those that memory is too short for: the training is worth more than a preview."""
        prompts = [self._prompts[index] for index in indexes]
        try:
            pictures = self._draw(prompts, [self._seeds[index] for index in indexes])
            return list(zip(indexes, pictures, strict=True))
        except DrawingError as error:
            problem = str(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            problem = (
                f"there is too little memory for a preview of {prompts[0].width}x{prompts[0].height};"
                " training goes on without it"
            )
        # Out of the handlers: an exception that is being handled holds the tensors of its frames.
        if self._processes.on_cuda:
            torch.cuda.empty_cache()
        if len(indexes) == 1:
            logger.warning("No preview of prompt %d: %s", indexes[0] + 1, problem)
            return []
        logger.info("%d previews cannot be drawn at a time, so they are drawn one by one: %s", len(indexes), problem)
        return [entry for index in indexes for entry in self._draw_batch([index])]

    def _write(self, name: str, save: Callable[[Path], None]) -> None:
        try:
            save(self._folder / name)
        except OSError as error:
            logger.warning("The preview %s could not be written: %s", self._folder / name, error.strerror or error)
