"""The loss on pictures that are held out: what tells learning from learning by heart.

Everything about it is fixed: the pictures and their order, their crops and captions, the noise of each picture, and the
noise levels. So two values differ only because the network does, and a change of a thousandth is a change.

Noise levels are the midpoints of eight equal parts of the range that is trained, two in each band of sigma. Fewer would
miss where a LoRA begins to overfit (mostly at low noise, where details are), drawn ones would add noise to the value,
and ones that follow ``--timestep_sampling`` could not be compared between runs with different settings.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from library.data.items import Batch, Item
from library.training import sigma_bands
from library.training.processes import Processes
from library.training.settings import ValidationSettings
from library.training.weights import Weights

logger = logging.getLogger(__name__)

NUM_LEVELS = 8


class HeldOut(Protocol):
    """The pictures that are held out."""

    @property
    def validation_items(self) -> Sequence[Item]:
        """The pictures; none where nothing is held out."""

    def validation_batches(self, rank: int, num_processes: int, max_batches: int | None) -> Iterable[Batch]:
        """Returns this process's part of each batch, always the same ones."""


def levels(timestep_range: tuple[int, int]) -> tuple[float, ...]:
    """Returns the noise levels to measure at, in the range of timesteps (0 to 1000) that is trained."""
    low, high = timestep_range
    return tuple((low + (high - low) * (number + 0.5) / NUM_LEVELS) / 1000 for number in range(NUM_LEVELS))


@dataclass(frozen=True)
class Measured:
    """One measurement: the mean over pictures and noise levels, and the mean of each band of noise levels."""

    mean: float
    bands: dict[str, float]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]], sigmas: Sequence[float]) -> Measured:
        """Returns the means of losses, one row a picture and one column a noise level.

        Sums are exact, so the order of the rows, which differs with the number of processes, does not matter.
        """
        per_level = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        bands: dict[str, list[float]] = {}
        for sigma, loss in zip(sigmas, per_level, strict=True):
            bands.setdefault(sigma_bands.NAMES[sigma_bands.band_of(sigma)], []).append(loss)
        return cls(_mean(per_level), {name: _mean(losses) for name, losses in bands.items()})


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class Validation:
    """Measures the validation loss when it is time."""

    def __init__(
        self,
        settings: ValidationSettings,
        data: HeldOut,
        losses_of: Callable[[Batch, Sequence[float]], Tensor],
        weights: Weights,
        processes: Processes,
        sigmas: Sequence[float],
        averaged_too: bool = False,
        on_measured: Callable[[float, int], object] = lambda loss, step: None,
    ) -> None:
        """Says once what will be measured, or that nothing can be.

        Args:
            settings: when.
            data: the pictures.
            losses_of: returns (B, len(sigmas)) losses of a batch.
            weights: puts the network into the state that it is used in.
            processes: over which pictures are split.
            sigmas: from :func:`levels`.
            averaged_too: measure with the moving average of ``--ema_decay`` as well.
            on_measured: told (mean loss of the weights as they are, optimizer step).
        """
        self._settings = settings
        self._data = data
        self._losses_of = losses_of
        self._weights = weights
        self._processes = processes
        self._sigmas = tuple(sigmas)
        self._averaged_too = averaged_too
        self._on_measured = on_measured
        self._last: tuple[int, Measured, Measured | None] | None = None
        steps, epochs = settings.validate_every_n_steps, settings.validate_every_n_epochs
        self._every_n_steps = steps
        self._every_n_epochs = 1 if steps is None and epochs is None else epochs
        if data.validation_items:
            when = [
                f"every {unit}" if number == 1 else f"every {number} {unit}s"
                for number, unit in ((steps, "step"), (self._every_n_epochs, "epoch"))
                if number
            ]
            num_pictures, num_levels = len(data.validation_items), len(self._sigmas)
            logger.info("Validation: %d pictures at %d noise levels, %s", num_pictures, num_levels, " and ".join(when))
        elif steps or epochs or settings.max_validation_steps:
            logger.warning(
                "--validate_every_n_steps, --validate_every_n_epochs and --max_validation_steps have no effect: no picture"
                " is held out; validation_split in the dataset file or --validation_split holds some out"
            )

    def after_step(self, step: int, training_average: float | None) -> dict[str, float]:
        """Returns what is worth logging of a measurement that is due after this optimizer step; empty where none is.

        Args:
            step: counted from 1.
            training_average: the training's running average, which the divergence is taken from.
        """
        if not self._data.validation_items or not self._every_n_steps or step % self._every_n_steps:
            return {}
        return self._values("step", step, training_average)

    def after_epoch(self, epoch: int, step: int, training_average: float | None) -> dict[str, float]:
        """Returns what is worth logging of a measurement that is due after this epoch, counted from 1."""
        if not self._data.validation_items or not self._every_n_epochs or epoch % self._every_n_epochs:
            return {}
        return self._values("epoch", step, training_average)

    def _values(self, unit: str, step: int, training_average: float | None) -> dict[str, float]:
        if self._last is None or self._last[0] != step:  # a step that ends an epoch may ask twice
            averaged = self._measure(averaged=True) if self._averaged_too else None
            self._last = (step, self._measure(averaged=False), averaged)
            self._report(training_average)
            self._on_measured(self._last[1].mean, step)
        _, raw, ema = self._last
        start = "loss/validation/"
        values = {f"{start}{unit}_average": raw.mean, **{start + name: loss for name, loss in raw.bands.items()}}
        if training_average is not None:
            values[f"{start}{unit}_divergence"] = raw.mean - training_average
        if ema is not None:
            values[f"{start}ema_average"] = ema.mean
        return values

    def _measure(self, averaged: bool) -> Measured:
        """Returns a measurement; it depends on the network's weights and on nothing else. All processes call it."""
        processes, settings = self._processes, self._settings
        batches = self._data.validation_batches(processes.rank, processes.count, settings.max_validation_steps)
        total = len(self._data.validation_items) if settings.max_validation_steps is None else None
        losses: list[Tensor] = []
        bar = tqdm(total=total, desc="validation", unit=" picture", leave=False, disable=not processes.is_main)
        with self._weights.in_use(averaged), torch.no_grad(), bar:
            for batch in batches:
                if batch.draws:
                    losses.append(self._losses_of(batch, self._sigmas))
                bar.update(batch.num_global)
        mine = torch.cat(losses).tolist() if losses else []  # one wait for the device
        return Measured.of([row for part in processes.gather(mine) for row in part], self._sigmas)

    def _report(self, training_average: float | None) -> None:
        if self._last is None:
            return
        step, raw, ema = self._last
        bands = ", ".join(f"{name.replace('_', ' ')}: {loss:.4f}" for name, loss in raw.bands.items())
        logger.info(
            "Validation loss after step %d: %.4f%s%s (%s)",
            step,
            raw.mean,
            "" if training_average is None else f", {raw.mean - training_average:+.4f} from the training average",
            "" if ema is None else f", {ema.mean:.4f} with the moving average",
            bands,
        )
