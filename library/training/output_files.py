"""What the LoRA files of a run are called, and which files and states of an earlier run it is going to overwrite."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.files import numbered, written_at
from library.training.state import StateNames

if TYPE_CHECKING:
    from library.training.arguments import TrainConfig

logger = logging.getLogger(__name__)


def companion(path: Path) -> Path:
    """Returns the file that holds the average of the LoRA in ``path``: ``my.safetensors`` -> ``my-ema.safetensors``."""
    return path.with_name(f"{path.stem}-ema{path.suffix}")


class LoraNames:
    """Names of a run's LoRA files, those of sd-scripts."""

    def __init__(self, folder: Path, output_name: str | None, extension: str) -> None:
        """Sets where files go, what their names begin with, and how they end (without the dot)."""
        self._folder = folder
        self._name = output_name
        self._end = f".{extension}"

    def of_epoch(self, epoch: int) -> Path:
        """Returns the file of an epoch, counted from 1."""
        return self._folder / f"{self._name or 'epoch'}-{epoch:06d}{self._end}"

    def of_step(self, step: int) -> Path:
        """Returns the file of a step, counted from 1."""
        return self._folder / f"{self._name or 'at'}-step{step:08d}{self._end}"

    def final(self) -> Path:
        """Returns the file of the whole run."""
        return self._folder / f"{self._name or 'last'}{self._end}"

    def epochs(self) -> dict[int, Path]:
        """Returns the files of epochs that are there."""
        return numbered(self._folder, re.escape(self._name or "epoch") + r"-(\d{6,})" + re.escape(self._end))

    def steps(self) -> dict[int, Path]:
        """Returns the files of steps that are there."""
        return numbered(self._folder, re.escape(self._name or "at") + r"-step(\d{8,})" + re.escape(self._end))


def warn_of_older_files(config: TrainConfig) -> None:
    """Warns, once, where a new run is going to overwrite LoRA files or states of this name; for the first process."""
    found = _in_the_way(config)
    if not found:
        return
    more = f", as will {len(found) - 1} more of its files and states" if len(found) > 1 else ""
    goes_on = ", and --resume=latest goes on from the last state" if any(path.is_dir() for path in found) else ""
    logger.warning(
        "%s of %s is from an earlier run and will be overwritten%s; another --output_name keeps it%s",
        found[0],
        written_at(found[0]),
        more,
        goes_on,
    )


def _in_the_way(config: TrainConfig) -> list[Path]:
    """Returns what exists and this run will write, as far as its length is known from the flags; the final file first."""
    output, state, schedule = config.output, config.state, config.schedule
    if output.output_dir is None:  # OutputSettings refuses that; stated for the type checker
        return []
    loras = LoraNames(output.output_dir, output.output_name, output.save_model_as)
    states = StateNames(output.output_dir, output.output_name)
    every_epochs = 1 if output.save_n_epoch_ratio else output.save_every_n_epochs
    last_epoch = schedule.max_train_epochs
    last_step = schedule.max_train_steps if last_epoch is None else None

    def due(paths: Mapping[int, Path], every: int | None, last: int | None) -> list[Path]:
        return [path for n, path in paths.items() if every and n % every == 0 and (last is None or n <= last)]

    found = [
        loras.final(),
        *due(loras.epochs(), every_epochs, last_epoch),
        *due(loras.steps(), output.save_every_n_steps, last_step),
    ]
    if config.optimizer.ema_decay is not None:
        found += [companion(path) for path in found]
    if state.save_state:
        found += due(states.epochs(), every_epochs, last_epoch)
        found += due(states.steps(), output.save_every_n_steps, last_step)
    if state.save_state or state.save_state_on_train_end:
        found.append(states.final())
    return [path for path in found if path.exists()]
