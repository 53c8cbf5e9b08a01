"""The learning rate's course, compared with the packages whose names the flags bear."""

from collections.abc import Callable

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from transformers.optimization import get_scheduler

from library.errors import SettingsError
from library.training import optimizers
from library.training.settings import OptimizerSettings
from library.training.updater import Updater

STEPS = 60
RATE = 1e-3


def sgd(*rates: float) -> torch.optim.SGD:
    """Returns an optimizer without gradients: its steps do nothing."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=rates[0], momentum=0.9)


def course(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> list[float]:
    """Returns the first group's rates of all steps and of the one after them."""
    rates = []
    for _ in range(STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(rate: float = RATE, **values: object) -> list[float]:
    optimizer = sgd(rate)
    settings = OptimizerSettings(learning_rate=rate, **values)  # type: ignore[arg-type]
    return course(optimizer, optimizers.build_scheduler(settings, optimizer, STEPS))


def theirs(name: str, warmup: int = 0, **arguments: object) -> list[float]:
    optimizer = sgd(RATE)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, scheduler_specific_kwargs=arguments
    )
    return course(optimizer, scheduler)


# (our flags, transformers' name and arguments as sd-scripts passes them)
CASES: list[tuple[dict, dict]] = [
    ({"lr_scheduler": "constant"}, {"name": "constant"}),
    ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 7}, {"name": "constant_with_warmup", "warmup": 7}),
    ({"lr_scheduler": "linear", "lr_warmup_steps": 7}, {"name": "linear", "warmup": 7}),
    ({"lr_scheduler": "cosine", "lr_warmup_steps": 0.1}, {"name": "cosine", "warmup": 6}),
    (
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "lr_warmup_steps": 7},
        {"name": "cosine_with_restarts", "warmup": 7, "num_cycles": 3},
    ),
    (
        {"lr_scheduler": "polynomial", "lr_scheduler_power": 2.5, "lr_warmup_steps": 7},
        {"name": "polynomial", "warmup": 7, "power": 2.5},
    ),
    ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 7}, {"name": "inverse_sqrt", "warmup": 7}),
    ({"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 5}, {"name": "inverse_sqrt", "timescale": 5}),
    (
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_num_cycles": 3},
        {"name": "cosine_with_min_lr", "min_lr_rate": 0.1, "num_cycles": 1.5},
    ),
    (
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": ("min_lr=2e-4",), "lr_warmup_steps": 7},
        {"name": "cosine_with_min_lr", "min_lr": 2e-4, "warmup": 7},
    ),
    (
        {"lr_scheduler": "cosine_warmup_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1, "lr_warmup_steps": 7},
        {"name": "cosine_warmup_with_min_lr", "min_lr_rate": 0.1, "warmup": 7},
    ),
    (
        {
            "lr_scheduler": "cosine_warmup_with_min_lr",
            "lr_scheduler_args": ("min_lr=0", "warmup_lr_rate=0.2"),
            "lr_warmup_steps": 7,
        },
        {"name": "cosine_warmup_with_min_lr", "min_lr": 0, "warmup_lr_rate": 0.2, "warmup": 7},
    ),
    *(
        (
            {
                "lr_scheduler": "warmup_stable_decay",
                "lr_warmup_steps": 7,
                "lr_decay_steps": 0.5,
                "lr_scheduler_min_lr_ratio": 0.1,
                "lr_scheduler_args": (f"decay_type='{kind}'", f"warmup_type='{kind}'"),
            },
            {
                "name": "warmup_stable_decay",
                "warmup": 7,
                "num_decay_steps": 30,
                "min_lr_ratio": 0.1,
                "decay_type": kind,
                "warmup_type": kind,
                "num_cycles": 0.5,
            },
        )
        for kind in ("linear", "cosine", "1-sqrt")
    ),
]


@pytest.mark.parametrize(("flags", "reference"), CASES, ids=lambda value: value.get("lr_scheduler", ""))
def test_every_schedule_is_the_known_one(flags: dict, reference: dict) -> None:
    # defect 45: cosine_warmup_with_min_lr ended in a TypeError
    # The same formulas in another order of operations: a few roundings of 2^-53.
    assert ours(**flags) == pytest.approx(theirs(**reference), rel=1e-12, abs=1e-18)


def test_piecewise_constant_is_diffusers() -> None:
    rules = "1:10,0.1:20,0.01:30,0.005"
    optimizer = sgd(RATE)
    expected = course(optimizer, get_piecewise_constant_schedule(optimizer, rules))
    found = ours(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules='{rules}'",))
    assert found == pytest.approx(expected, rel=1e-12)
    assert len(set(found)) == 4


def test_a_lowest_rate_is_the_same_for_every_group() -> None:
    """transformers divides it by --learning_rate, so that a group with another rate ends elsewhere."""
    optimizer = sgd(1e-3, 1e-4)
    settings = OptimizerSettings(
        learning_rate=1e-3, lr_scheduler="cosine_with_min_lr", lr_scheduler_args=("min_lr=1e-5",)
    )
    course(optimizer, optimizers.build_scheduler(settings, optimizer, STEPS + 1))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-5])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycle=2",)}, "lr_scheduler cosine: .*num_cycle"),
        ({"lr_scheduler": "polynomial", "rate": 5e-8}, "lr_end=0"),
        (
            {
                "lr_scheduler": "cosine_with_min_lr",
                "lr_scheduler_args": ("min_lr=1",),
                "lr_scheduler_min_lr_ratio": 0.1,
            },
            "both set",
        ),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='1-2'",)}, "piecewise_constant: "),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ("decay_type='fast'",)}, "'fast'"),
        ({"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": ("factor=2",)}, "Factor should be < 1.0"),
    ],
)
def test_what_a_schedule_refuses_is_a_users_error(values: dict, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        ours(**values)


def test_a_decay_that_never_comes_or_never_ends_is_said(caplog: pytest.LogCaptureFixture) -> None:
    ours(lr_scheduler="warmup_stable_decay")
    assert "never decays" in caplog.text
    ours(lr_scheduler="warmup_stable_decay", lr_decay_steps=50, lr_warmup_steps=20)
    assert "longer than the run" in caplog.text


def plateau(name: str = "reduce_lr_on_plateau", **values: object) -> tuple[Updater, Callable[[], float]]:
    optimizer = sgd(RATE)
    given = {"lr_scheduler": name, "lr_scheduler_args": ("patience=0", "factor=0.1"), **values}
    scheduler = optimizers.build_scheduler(OptimizerSettings(**given), optimizer, STEPS)  # type: ignore[arg-type]
    updater = Updater(None, optimizer, scheduler, ["unet"], 1.0, None)
    return updater, lambda: optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lr_scheduler": "constant", "lr_scheduler_type": "ReduceLROnPlateau"},
        {
            "lr_scheduler_type": "transformers.optimization.GreedyLR",
            "lr_scheduler_args": ("patience=0", "factor=0.1", "min_lr=1e-6"),
        },
    ],
)
def test_a_plateau_of_the_training_loss_lowers_the_rate(values: dict, caplog: pytest.LogCaptureFixture) -> None:
    # defect 45: reduce_lr_on_plateau ended in a TypeError
    caplog.set_level("INFO")
    updater, rate = plateau(**values)
    updater.apply()
    updater.after_epoch(1.0)
    updater.after_epoch(0.5)
    falling = rate()
    updater.after_epoch(0.9)
    updater.apply()
    assert rate() == pytest.approx(falling * 0.1)
    assert f"unet {falling:g} -> {rate():g}" in caplog.text


def test_a_validation_loss_goes_before_the_training_loss() -> None:
    updater, rate = plateau()
    updater.after_epoch(0.1)
    updater.after_validation(5.0, step=1)  # worse than the training loss, but the first of its kind
    updater.after_epoch(99.0)
    assert rate() == RATE
    updater.after_validation(6.0, step=2)
    assert rate() == pytest.approx(RATE * 0.1)


def test_a_plateau_goes_on_from_its_state() -> None:
    first, _ = plateau()
    first.after_validation(0.5, step=3)
    first.after_validation(0.6, step=4)
    second, rate = plateau()
    second.load_state_dict(first.state_dict())
    assert rate() == pytest.approx(RATE * 0.1)
    second.after_epoch(9.0)
    second.after_validation(0.4, step=5)
    assert rate() == pytest.approx(RATE * 0.1)
    second.after_validation(0.5, step=6)
    assert rate() == pytest.approx(RATE * 0.01)


def test_a_schedule_that_ends_before_the_run_is_a_users_error() -> None:
    updater, _ = plateau("constant", lr_scheduler_type="OneCycleLR", lr_scheduler_args=("max_lr=1", "total_steps=2"))
    for _ in range(2):
        updater.apply()
    with pytest.raises(SettingsError, match=r"--lr_scheduler_args: OneCycleLR .* total steps is 2"):
        updater.apply()


def test_a_schedule_of_no_steps_is_a_users_error() -> None:
    updater, _ = plateau("constant", lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=0",))
    with pytest.raises(SettingsError, match=r"--lr_scheduler_args: StepLR gives no further learning rate"):
        updater.apply()


def test_a_negative_power_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"--lr_scheduler_power: -1.0 is below 0"):
        OptimizerSettings(lr_scheduler="polynomial", lr_scheduler_power=-1.0)
