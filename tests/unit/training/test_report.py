"""Length of a run."""

import pytest

from library.training.report import RunPlan
from library.training.settings import ScheduleSettings


@pytest.mark.parametrize(
    ("settings", "num_batches", "expected"),
    [
        ({"max_train_epochs": 3}, 10, (30, 3)),
        ({"max_train_epochs": 3, "gradient_accumulation_steps": 4}, 10, (9, 3)),  # 4 + 4 + 2 batches an epoch
        ({"max_train_steps": 25}, 10, (25, 3)),
        ({"max_train_steps": 30}, 10, (30, 3)),
        ({"max_train_steps": 5, "max_train_epochs": 2}, 10, (20, 2)),
        ({}, 400, (1600, 4)),
    ],
)
def test_steps_and_epochs(settings: dict, num_batches: int, expected: tuple[int, int]) -> None:
    plan = RunPlan.of(ScheduleSettings(**settings), num_batches)
    assert (plan.num_steps, plan.num_epochs) == expected
