"""The order of what happens around steps, and what happens once before and behind them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from library.training.events import RunEvents


class Part:
    """Notes what it is asked for, and answers as told."""

    def __init__(self, name: str, calls: list[str], **answers: Any) -> None:
        self._name, self._calls, self._answers = name, calls, answers

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            if not name.startswith(("is_", "awaits_")):
                self._calls.append(f"{self._name}.{name}{given}")
            return self._answers.get(name)

        return called


def events_of(
    calls: list[str], step: int = 0, is_main: bool = True, is_at_end: bool = False, **answers: Any
) -> tuple[RunEvents, SimpleNamespace]:
    """Returns the events of a run of three epochs of four steps, and its loop."""
    processes = SimpleNamespace(is_main=is_main, wait=lambda: calls.append("wait"))
    progress = SimpleNamespace(average=0.5, leave_time_out=lambda: calls.append("leave time out"))
    loop: Any = SimpleNamespace(
        step=step,
        is_at_end=is_at_end,
        is_whole=True,
        parts=SimpleNamespace(progress=progress, processes=processes),
        settings=SimpleNamespace(plan=SimpleNamespace(steps_per_epoch=4, num_steps=12, num_epochs=3)),
    )
    parts: list[Any] = [
        Part(name, calls, **answers) for name in ("updater", "trackers", "validation", "previews", "saver")
    ]
    return RunEvents(loop, *parts, lambda has_trained: calls.append(f"put away {has_trained}")), loop


@pytest.mark.parametrize("saves", [True, False])
def test_a_state_is_written_last_after_a_step(saves: bool) -> None:
    calls: list[str] = []
    events, _ = events_of(calls, is_step=saves, after_step={})
    events.after_step(6)
    assert calls == [
        "saver.after_step(6, 1)",
        "validation.after_step(6, 0.5)",
        "trackers.log({}, 6)",
        "previews.after_step(6,)",
        "put away True",
        "saver.state_after_step(6,)",
        *(["wait"] if saves else []),
        "leave time out",
    ]


def test_an_epoch_changes_training_first_and_writes_its_state_last() -> None:
    calls: list[str] = []
    events, _ = events_of(calls, is_epoch=True, after_epoch={})
    events.after_epoch(2, 8, {"loss/epoch_average": 0.25})
    assert calls == [
        "updater.after_epoch(0.25,)",
        "trackers.log({'loss/epoch_average': 0.25}, 8)",
        "saver.after_epoch(2, 8)",
        "validation.after_epoch(2, 8, 0.5)",
        "trackers.log({}, 8)",
        "previews.after_epoch(2, 8)",
        "put away True",
        "saver.state_after_epoch(2,)",
        "wait",
        "leave time out",
    ]


def test_an_epoch_end_that_comes_again_changes_nothing_twice() -> None:
    calls: list[str] = []
    events, _ = events_of(calls)
    events.after_epoch(2, 8, {})
    assert not any(call.startswith("updater") for call in calls)


def test_only_the_first_process_writes() -> None:
    calls: list[str] = []
    events, loop = events_of(calls, is_main=False, is_step=True, is_epoch=True)
    events.after_step(1)
    events.after_epoch(1, 4, {})
    loop.step = 4
    events.at_interrupt()
    events.at_end()
    assert not any(call.startswith("saver") for call in calls)
    assert calls.count("wait") == 2


def test_before_the_first_step_pictures_may_be_drawn() -> None:
    calls: list[str] = []
    events_of(calls)[0].before_steps(is_continued=False)
    assert calls == ["previews.at_first()", "put away False"]


@pytest.mark.parametrize(("is_continued", "awaits"), [(True, True), (True, False), (False, True)])
def test_a_continued_run_makes_up_for_a_measurement(is_continued: bool, awaits: bool) -> None:
    calls: list[str] = []
    events, _ = events_of(calls, step=4, awaits_validation=awaits, after_step={"loss": 1.0})
    events.before_steps(is_continued)
    measured = ["validation.after_step(4, 0.5)", "trackers.log({'loss': 1.0}, 4)"]
    assert calls == (measured if is_continued and awaits else [])


def test_a_run_at_its_end_says_so(caplog: pytest.LogCaptureFixture) -> None:
    events_of([], step=12, is_at_end=True)[0].before_steps(is_continued=True)
    assert "at its end already (step 12 of 12)" in caplog.text


def test_an_interrupt_saves_what_has_been_trained() -> None:
    calls: list[str] = []
    events, loop = events_of(calls, step=5)
    events.at_interrupt()
    assert calls == []  # nothing has
    loop.step = 9
    events.at_interrupt()
    assert calls == ["saver.at_interrupt(9, 2, True)"]


def test_the_end_writes_the_final_file() -> None:
    calls: list[str] = []
    events_of(calls, step=12)[0].at_end()
    assert calls == ["saver.at_end(12, 3)"]
