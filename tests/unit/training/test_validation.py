"""When the validation loss is measured, and that nothing but the network changes it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_helpers import FakeProcesses
from torch import Tensor

from library.training import sigma_bands
from library.training.settings import ValidationSettings
from library.training.validation import Measured, Validation, levels

ALL = levels((0, 1000))


class Held:
    """Five pictures in batches of two a process, and the losses that a network of strength ``network`` has on them."""

    def __init__(self, num_pictures: int = 5) -> None:
        self.validation_items: Sequence[Any] = range(num_pictures)
        self.network = 1.0
        self.evaluated = 0

    def validation_batches(self, rank: int, num_processes: int, max_batches: int | None = None) -> Iterator[Any]:
        size = 2 // num_processes
        starts = list(range(0, len(self.validation_items), size * num_processes))[:max_batches]
        for start in starts:
            whole = self.validation_items[start : start + size * num_processes]
            mine = whole[rank * size : (rank + 1) * size]
            yield SimpleNamespace(draws=tuple(mine), num_global=len(whole))

    def losses_of(self, batch: Any, sigmas: Sequence[float]) -> Tensor:
        assert not torch.is_grad_enabled()
        self.evaluated += len(batch.draws)
        # Numbers whose float32 sums would depend on their order.
        rows = [[self.network * (1 + 0.1 * picture) ** 9 * (1 + sigma) for sigma in sigmas] for picture in batch.draws]
        return torch.tensor(rows)


class FakeWeights:
    """Keeps which weights were asked for; the average's losses are half as large."""

    def __init__(self, held: Held) -> None:
        self.entered: list[bool] = []
        self._held = held

    @contextlib.contextmanager
    def in_use(self, averaged: bool = False) -> Iterator[None]:
        self.entered.append(averaged)
        before = self._held.network
        self._held.network = before / 2 if averaged else before
        yield
        self._held.network = before


def process(rank: int = 0, count: int = 1, gather: Any = lambda values: [values]) -> Any:
    return SimpleNamespace(rank=rank, count=count, gather=gather, is_main=False)


def validation(
    held: Held, over: Any = None, averaged_too: bool = False, **settings: int
) -> tuple[Validation, FakeWeights]:
    weights = FakeWeights(held)
    made = Validation(
        ValidationSettings(**settings),
        held,
        held.losses_of,
        weights,
        over or process(),
        ALL,
        averaged_too,  # type: ignore[arg-type]
    )
    return made, weights


def test_levels_are_two_in_each_band() -> None:
    assert ALL == (0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375)
    assert [sigma_bands.band_of(level) for level in ALL] == [0, 0, 1, 1, 2, 2, 3, 3]
    narrow = levels((500, 900))
    assert 0.5 < min(narrow) < max(narrow) < 0.9  # what is not trained says nothing


def test_means_by_hand() -> None:
    measured = Measured.of([[1.0, 3.0, 5.0], [3.0, 5.0, 9.0]], (0.1, 0.2, 0.9))
    assert measured.mean == (2 + 4 + 7) / 3
    assert measured.bands == {"sigma_0.00-0.25": 3.0, "sigma_0.75-1.00": 7.0}


def test_what_is_logged() -> None:
    held = Held()
    made, weights = validation(held, averaged_too=True)
    values = made.after_epoch(1, 20, training_average=0.5)
    average = values["loss/validation/epoch_average"]
    assert set(values) == {
        "loss/validation/epoch_average",
        "loss/validation/epoch_divergence",
        "loss/validation/ema_average",
        *(f"loss/validation/{name}" for name in sigma_bands.NAMES),
    }
    assert values["loss/validation/epoch_divergence"] == average - 0.5
    assert values["loss/validation/ema_average"] == pytest.approx(average / 2)
    assert sorted(weights.entered) == [False, True]


def test_each_measurement_stands_alone() -> None:
    """defect 10: averages that were carried over from earlier measurements (true 3.0 gave 2.0)."""
    held = Held()
    made, _ = validation(held, validate_every_n_steps=10)
    found = []
    for number, strength in enumerate((1.0, 3.0, 5.0, 1.0), start=1):
        held.network = strength
        found.append(made.after_step(10 * number, None)["loss/validation/step_average"])
    assert found[1:] == pytest.approx([3 * found[0], 5 * found[0], found[0]])
    assert found[3] == found[0]


def test_divergence_is_from_the_training_average() -> None:
    made, _ = validation(Held(), validate_every_n_steps=1)
    assert "loss/validation/step_divergence" not in made.after_step(1, None)
    values = made.after_step(2, 0.25)
    assert values["loss/validation/step_divergence"] == values["loss/validation/step_average"] - 0.25


@pytest.mark.parametrize(
    ("settings", "steps", "epochs"),
    [
        ({}, [], [1, 2, 3, 4]),
        ({"validate_every_n_steps": 4}, [4, 8, 12], []),
        ({"validate_every_n_epochs": 3}, [], [3]),
        ({"validate_every_n_steps": 6, "validate_every_n_epochs": 2}, [6, 12], [2, 4]),
    ],
)
def test_when_it_is_measured(settings: dict[str, int], steps: list[int], epochs: list[int]) -> None:
    made, _ = validation(Held(), **settings)
    assert [step for step in range(1, 13) if made.after_step(step, None)] == steps
    assert [epoch for epoch in range(1, 5) if made.after_epoch(epoch, 3 * epoch, None)] == epochs


def test_a_step_that_ends_an_epoch_is_measured_once() -> None:
    held = Held()
    made, _ = validation(held, validate_every_n_steps=5, validate_every_n_epochs=1)
    of_step, of_epoch = made.after_step(5, None), made.after_epoch(1, 5, None)
    assert held.evaluated == 5
    assert of_step["loss/validation/step_average"] == of_epoch["loss/validation/epoch_average"]


def test_the_same_few_pictures_each_time() -> None:
    """defect 68: a limit took other pictures each epoch."""
    held = Held()
    made, _ = validation(held, max_validation_steps=2)
    found = {made.after_epoch(epoch, epoch, None)["loss/validation/epoch_average"] for epoch in (1, 2, 3)}
    assert len(found) == 1
    assert held.evaluated == 3 * 4


@pytest.mark.parametrize("num_pictures", [1, 4, 5])
def test_two_processes_say_what_one_says(num_pictures: int) -> None:
    alone, _ = validation(Held(num_pictures))
    expected = alone.after_epoch(1, 1, 0.5)
    group = FakeProcesses(2)

    def measure(rank: int) -> dict[str, float]:
        made, _ = validation(Held(num_pictures), process(rank, 2, group.gather(rank)))
        return made.after_epoch(1, 1, 0.5)

    # To the bit: the losses are those of the same pictures, and their sums are exact.
    assert group.run(measure) == [expected, expected]


def test_nothing_held_out(caplog: pytest.LogCaptureFixture) -> None:
    made, weights = validation(Held(0))
    assert made.after_epoch(1, 1, 0.5) == made.after_step(1, 0.5) == {}
    assert not caplog.records
    assert not weights.entered
    validation(Held(0), max_validation_steps=3)
    assert "no picture is held out" in caplog.text


def test_the_log_says_it_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made, _ = validation(Held(), validate_every_n_steps=50, validate_every_n_epochs=1)
    made.after_step(50, 0.5)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "Validation: 5 pictures at 8 noise levels, every 50 steps and every epoch"
    assert second.startswith("Validation loss after step 50: ")
    assert "from the training average (sigma 0.00-0.25: " in second
