"""Running averages, speed and time left."""

import json
import random

import pytest
import torch

from library.training.progress import Progress
from library.training.report import RunPlan

PLAN = RunPlan(num_batches=10, steps_per_epoch=10, num_steps=100, num_epochs=10)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(progress: Progress, loss: float = 1.0, num_samples: int = 4, **values: float) -> dict[str, float]:
    found = {"loss/current": loss, **values}
    progress.after_step(found, 1, num_samples)
    return found


def test_the_average_is_over_an_epoch_of_steps() -> None:
    progress = Progress(PLAN, visible=False)
    assert progress.average is None
    losses = [float(number) for number in range(1, 26)]
    averages = [step(progress, loss)["loss/average"] for loss in losses]
    assert averages[:3] == [1.0, 1.5, 2.0]  # from the first step on, without zeros before it
    assert averages[24] == sum(losses[15:]) / 10
    assert progress.average == averages[24]
    assert progress.after_epoch() == {"loss/epoch_average": sum(losses) / 25}
    assert progress.after_epoch() == {}


def test_averages_go_on_exactly_after_a_resume() -> None:
    """defect 10: after a resume the average began near 0."""
    draw = random.Random(0)
    losses = [draw.random() for _ in range(40)]
    whole, first = Progress(PLAN, visible=False), Progress(PLAN, visible=False)
    expected = [step(whole, loss)["loss/average"] for loss in losses]
    for loss in losses[:27]:
        step(first, loss)
    resumed = Progress(PLAN, visible=False)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.average == expected[26]
    assert [step(resumed, loss)["loss/average"] for loss in losses[27:]] == expected[27:]
    assert resumed.after_epoch() == whole.after_epoch()


def test_speed_leaves_the_first_step_and_pauses_out() -> None:
    clock = Clock()
    progress = Progress(PLAN, visible=False, clock=clock)
    clock.now += 60  # compiling
    assert "speed/images_per_s" not in step(progress)
    clock.now += 300  # a preview
    progress.leave_time_out()
    clock.now += 2
    assert step(progress)["speed/images_per_s"] == 2.0
    clock.now += 1
    assert step(progress, num_samples=2)["speed/images_per_s"] == 2.0
    for _ in range(20):
        clock.now += 0.5
        values = step(progress)
    assert values["speed/images_per_s"] == 8.0  # slow steps are forgotten


def test_the_bar(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    progress = Progress(PLAN, visible=True, clock=clock)
    with progress.shown(start_step=40):
        step(progress, 0.5, **{"lr/unet": 1e-4, "lr/textencoder": 1e-5})
        assert "left ?" in str(progress._bar)
        clock.now += 2
        step(progress, 0.25, **{"lr/unet": 1e-4})
        shown = str(progress._bar)
    assert shown.startswith("steps:  42%")
    assert "42/100" in shown
    assert "left 01:56, avr_loss=0.3750, lr=1.00e-04, 2 img/s, epoch 1/10]" in shown
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("rates", "shown"),
    [
        ({"lr/textencoder": 1e-5, "lr/unet": 1e-4}, "lr=1.00e-04 (text encoder 1.00e-05), "),
        ({"lr/textencoder": 1e-4, "lr/unet": 1e-4}, "lr=1.00e-04, "),
        ({"lr/textencoder": 1e-5}, "lr=1.00e-05, "),
        ({"lr/unet": 1e-4, "lr/unet plus": 4e-4}, "lr=1.00e-04, "),  # LoRA+
        ({"lr/unet": 1.0, "lr/d*lr/unet": 1e-4}, "lr=1.00e+00, "),  # Prodigy
        ({"lr/group0": 1e-4}, "lr=1.00e-04, "),
        ({}, "avr_loss=1.0000, epoch"),
    ],
)
def test_rates_in_the_bar(rates: dict[str, float], shown: str) -> None:
    progress = Progress(PLAN, visible=True)
    with progress.shown(start_step=0):
        step(progress, **rates)
        assert shown in str(progress._bar)
        assert shown.startswith("avr") or str(progress._bar).count("lr=") == 1


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**29)
    assert "memory/device_gib" not in step(Progress(PLAN, visible=False, device=torch.device("cpu")))
    assert step(Progress(PLAN, visible=False, device=torch.device("cuda")))["memory/device_gib"] == 1.5
