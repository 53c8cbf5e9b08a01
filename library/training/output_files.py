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
    from library.training.report import RunPlan

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


def warn_of_older_files(config: TrainConfig, plan: RunPlan) -> None:
    """Warns, once, where a new run is going to overwrite LoRA files or states of this name; for the first process."""
    if config.output.output_dir is None:  # OutputSettings refuses that; stated for the type checker
        return
    states = StateNames(config.output.output_dir, config.output.output_name)
    found = _in_the_way(config, config.output.output_dir, states, plan)
    if not found:
        return
    more = f", as will {len(found) - 1} more of its files and states" if len(found) > 1 else ""
    goes_on = ", and --resume=latest goes on from the last state" if states.newest() is not None else ""
    logger.warning(
        "%s of %s is from an earlier run and will be overwritten%s; another --output_name keeps it%s",
        found[0],
        written_at(found[0]),
        more,
        goes_on,
    )


def _in_the_way(config: TrainConfig, folder: Path, states: StateNames, plan: RunPlan) -> list[Path]:
    """Returns what exists and this run will write, the final file first."""
    output, state = config.output, config.state
    loras = LoraNames(folder, output.output_name, output.save_model_as)
    start = state.first_step(plan.steps_per_epoch) or 0
    every_epochs, every_steps = output.epochs_between_files(plan.num_epochs), output.save_every_n_steps
    # The last epoch's file is the final one.
    epochs, steps = range(start // plan.steps_per_epoch + 1, plan.num_epochs), range(start + 1, plan.num_steps + 1)

    def due(of_epochs: Mapping[int, Path], of_steps: Mapping[int, Path]) -> list[Path]:
        return [
            path
            for paths, every, numbers in ((of_epochs, every_epochs, epochs), (of_steps, every_steps, steps))
            for number, path in paths.items()
            if every and number % every == 0 and number in numbers
        ]

    found = [loras.final(), *due(loras.epochs(), loras.steps())]
    if config.optimizer.ema_decay is not None:
        found += [companion(path) for path in found]
    if state.save_state:
        found += due(states.epochs(), states.steps())
    if state.save_state or state.save_state_on_train_end:
        found.append(states.final())
    return [path for path in found if path.exists()]
