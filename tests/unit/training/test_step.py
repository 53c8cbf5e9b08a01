"""One optimizer step over batches and processes, and what it says of itself."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.training import sigma_bands
from library.training.hooks import Losses
from library.training.processes import Processes
from library.training.step import TrainStep


class FakeUpdater:
    """One parameter, and no change to it."""

    def __init__(self) -> None:
        self.parameters = [torch.nn.Parameter(torch.ones(2))]

    def in_order_of_use(self) -> list[torch.nn.Parameter]:
        return self.parameters

    def clip(self) -> Tensor:
        return self.parameters[0].grad.norm()  # type: ignore[union-attr]

    def apply(self) -> dict[str, float]:
        return {"lr/unet": 0.5}

    def norms(self) -> dict[str, float]:
        return {"norm/lora": 3.0}


def batch_of(values: list[float], sigmas: list[float], weights: list[float] | None = None) -> Any:
    draws = tuple(SimpleNamespace(item=SimpleNamespace(path=SimpleNamespace(name=f"p{value}.png"))) for value in values)
    weights_of = torch.tensor(weights or [1.0] * len(values))
    return SimpleNamespace(draws=draws, loss_weights=weights_of, values=values, sigmas=sigmas)


def step_of(updater: FakeUpdater, over: Any) -> TrainStep:
    def losses_of(batch: Any) -> Losses:
        return Losses(torch.tensor(batch.values) * updater.parameters[0].sum() / 2, torch.tensor(batch.sigmas))

    return TrainStep(losses_of, updater, over)  # type: ignore[arg-type]


def one_process() -> Any:
    alone = Processes.__new__(Processes)
    alone.count = 1
    return alone


BATCHES = ([1.0, 2.0, 4.0], [0.1, 0.9, 0.2]), ([8.0], [0.75])


def test_what_a_step_says() -> None:
    updater = FakeUpdater()
    batches = [batch_of(*BATCHES[0], weights=[1.0, 1.0, 0.5]), batch_of([], []), batch_of(*BATCHES[1])]
    values = step_of(updater, one_process())(batches, 4, 1)
    # Loss and gradient are weighted; the bands say how far predictions are off, whatever a picture weighs.
    assert values == pytest.approx(
        {
            "loss/current": (1 + 2 + 2 + 8) / 4,
            "loss/sigma_0.00-0.25": 2.5,
            "loss/sigma_0.75-1.00": 5.0,
            "norm/gradient": math.sqrt(2) * (1 + 2 + 2 + 8) / 4 / 2,
            "lr/unet": 0.5,
        }
    )
    # defect 61: names without stray spaces, each once
    assert all(name == name.strip() for name in values)


def test_every_tenth_step_says_how_large_the_network_is() -> None:
    one = step_of(FakeUpdater(), one_process())
    with_norms = [step for step in range(1, 31) if "norm/lora" in one([batch_of([1.0], [0.5])], 1, step)]
    assert with_norms == [10, 20, 30]


def pair_of(add_up: Callable[[Tensor], None]) -> Any:
    """Returns one of two processes, where ``add_up`` stands for the exchange with the other one."""

    def begin(flat: Tensor) -> Any:
        add_up(flat)
        return SimpleNamespace(wait=lambda: None)

    return SimpleNamespace(count=2, add_up=begin)


def test_two_processes_say_what_one_says() -> None:
    """Gradients and values of all processes are added up in one exchange."""
    flats: list[Tensor] = []

    def add_to_the_first(flat: Tensor) -> None:
        flats.append(flat.clone())
        if len(flats) == 2:
            flat += flats[0]

    first, second, both = FakeUpdater(), FakeUpdater(), FakeUpdater()
    step_of(first, pair_of(add_to_the_first))([batch_of(*BATCHES[0])], 4, 1)
    found = step_of(second, pair_of(add_to_the_first))([batch_of(*BATCHES[1])], 4, 1)
    expected = step_of(both, one_process())([batch_of(*part) for part in BATCHES], 4, 1)
    assert len(flats) == 2
    assert found == expected  # small whole numbers: sums are exact in any order
    assert torch.equal(second.parameters[0].grad, both.parameters[0].grad)  # type: ignore[arg-type]


def test_a_process_without_a_picture_takes_part_with_zeros() -> None:
    updater = FakeUpdater()
    values = step_of(updater, pair_of(lambda flat: flat.add_(1.0)))([batch_of([], [])], 4, 1)
    assert updater.parameters[0].grad.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    assert values["loss/current"] == 1.0


def test_a_loss_that_is_no_number_names_the_pictures() -> None:
    with pytest.raises(UserError, match=r"loss of step 7 is nan.*pnan\.png"):
        step_of(FakeUpdater(), one_process())([batch_of([float("nan")], [0.5])], 1, 7)


def test_bands_have_their_ends() -> None:
    assert sigma_bands.NAMES == ("sigma_0.00-0.25", "sigma_0.25-0.50", "sigma_0.50-0.75", "sigma_0.75-1.00")
    levels = [0.0, 0.2499, 0.25, 0.5, 0.75, 1.0]
    assert [sigma_bands.band_of(level) for level in levels] == [0, 0, 1, 2, 3, 3]
    sums = sigma_bands.sums(torch.ones(6), torch.tensor(levels)).tolist()
    assert sums == [2, 1, 1, 2, 2, 1, 1, 2]
    assert sigma_bands.means([3.0, 0, 0, 8.0, 2.0, 0, 0, 1.0], "x/") == {
        "x/sigma_0.00-0.25": 1.5,
        "x/sigma_0.75-1.00": 8,
    }
