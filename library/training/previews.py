"""Pictures drawn while training: when, under which names, by which process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.errors import DrawingError
from library.files import write_with
from library.keyed_random import key
from library.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.training.processes import Processes
    from library.training.settings import SampleSettings
    from library.training.trackers import Trackers

logger = logging.getLogger(__name__)

Draw = Callable[[Sequence[Prompt], Sequence[int]], "list[Image]"]
"""(prompts of one size and set of options, their seeds) -> RGB pictures."""


class Previews:
    """Draws the sample prompts at the times that the settings name.

    Files go to ``sample/`` in the output folder under sd-scripts' names. A prompt without a seed gets one from the run's
    seed and its place, the same at every event, so that pictures of different epochs can be compared.
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
    ) -> None:
        self._settings = settings
        self._prompts = prompts
        self._seed = seed
        self._folder = folder / "sample"
        self._prefix = f"{output_name}_" if output_name else ""
        self._processes = processes
        self._trackers = trackers
        self._draw = draw

    def at_first(self) -> None:
        """Draws before the first step, where asked for."""
        if self._settings.sample_at_first:
            self._draw_all("e000000", 0)

    def after_step(self, step: int) -> None:
        """Draws after a step, where asked for; ``--sample_every_n_epochs`` goes before ``--sample_every_n_steps``."""
        every = self._settings.sample_every_n_steps
        if every and not self._settings.sample_every_n_epochs and step % every == 0:
            self._draw_all(f"{step:06d}", step)

    def after_epoch(self, epoch: int, step: int) -> None:
        """Draws after an epoch, where asked for."""
        every = self._settings.sample_every_n_epochs
        if every and epoch % every == 0:
            self._draw_all(f"e{epoch:06d}", step)

    def _draw_all(self, moment: str, step: int) -> None:
        if not self._prompts:
            return
        mine = range(self._processes.rank, len(self._prompts), self._processes.count)
        drawn = [(index, picture) for index in mine if (picture := self._draw_one(index, moment)) is not None]
        if self._processes.on_cuda:
            torch.cuda.empty_cache()  # what the autoencoder needed is much, and training needs it for itself
        pictures = [entry for part in self._processes.gather(drawn) for entry in part]
        for index, picture in sorted(pictures, key=lambda entry: entry[0]):
            self._trackers.log_picture(f"sample_{index}", picture, step)
        logger.info("Drew %d pictures to %s", len(pictures), self._folder)

    def _draw_one(self, index: int, moment: str) -> Image | None:
        """Returns the picture, or None where memory is too short for it: the training is worth more than a preview."""
        prompt = self._prompts[index]
        seed = prompt.seed if prompt.seed is not None else key("preview", self._seed, index) % 2**32
        try:
            (picture,) = self._draw([prompt], [seed])
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            logger.warning(
                "There is too little memory for a preview of %dx%d; training goes on without it",
                prompt.width,
                prompt.height,
            )
            return None
        except DrawingError as error:
            logger.warning("No preview: %s", error)
            return None
        given = "" if prompt.seed is None else f"_{prompt.seed}"
        name = f"{self._prefix}{moment}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}{given}.png"
        write_with(self._folder / name, lambda path: picture.save(path))
        return picture
