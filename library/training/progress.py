"""What a person sees of a running training: the bar with loss, speed and time left, and the averages behind it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from library.training.report import RunPlan

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
_STEPS_OF_SPEED = 20  # short enough to follow another picture size, long enough not to jump
_GIB = 2**30


class Progress:
    """The progress bar, the running averages of the loss, and the speed."""

    def __init__(
        self,
        plan: RunPlan,
        visible: bool,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with nothing averaged.

        Args:
            plan: length of the run.
            visible: whether the bar is shown.
            device: whose memory is reported, where it is a GPU.
            clock: gives seconds.
        """
        self._plan = plan
        self._visible = visible
        self._device = device if device is not None and device.type == "cuda" else None
        self._clock = clock
        self._bar: tqdm | None = None
        self._recent: deque[float] = deque()
        self._recent_sum = 0.0
        self._epoch_sum = 0.0
        self._epoch_count = 0
        # Of this program's life, not of the run's: a resumed run measures its speed anew.
        self._warm_since: float | None = None  # the end of the first step, which also compiles and fills caches
        self._warm_steps = 0
        self._running_since: float | None = None
        self._speeds: deque[tuple[int, float]] = deque(maxlen=_STEPS_OF_SPEED)  # samples and seconds of a step
        self._step = 0

    @property
    def average(self) -> float | None:
        """The loss over the last epoch's worth of steps; None before the first step."""
        return self._recent_sum / len(self._recent) if self._recent else None

    @contextmanager
    def shown(self, start_step: int) -> Iterator[None]:
        """Shows the bar while the block runs."""
        self._step = start_step
        total = self._plan.num_steps
        with tqdm(total=total, initial=start_step, desc="steps", disable=not self._visible, bar_format=_BAR) as bar:
            self._bar = bar
            yield

    def after_step(self, values: dict[str, float], epoch: int, num_samples: int) -> None:
        """Adds the running average, speed and memory to a step's values, and moves the bar."""
        self._step += 1
        self._add(values["loss/current"])
        values["loss/average"] = self._recent_sum / len(self._recent)
        now = self._clock()
        if self._running_since is not None:
            self._speeds.append((num_samples, now - self._running_since))
        if self._warm_since is None:
            self._warm_since = now
        else:
            self._warm_steps += 1
        self._running_since = now
        if seconds := sum(seconds for _, seconds in self._speeds):
            values["speed/images_per_s"] = sum(samples for samples, _ in self._speeds) / seconds
        if self._device is not None:
            values["memory/device_gib"] = torch.cuda.max_memory_reserved(self._device) / _GIB
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(values, epoch), refresh=False)
            self._bar.update()

    def leave_time_out(self) -> None:
        """Lets the time since the last step (saving, previews, validation) not count as a step's."""
        if self._running_since is not None:
            self._running_since = self._clock()

    def after_epoch(self) -> dict[str, float]:
        """Returns what is worth logging of the epoch that ends."""
        if not self._epoch_count:
            return {}
        values = {"loss/epoch_average": self._epoch_sum / self._epoch_count}
        self._epoch_sum, self._epoch_count = 0.0, 0
        return values

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages as plain numbers."""
        return {
            "recent": list(self._recent),
            "recent_sum": self._recent_sum,
            "epoch_sum": self._epoch_sum,
            "epoch_count": self._epoch_count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the averages of :meth:`state_dict`, to the bit."""
        self._recent = deque(state["recent"])
        self._recent_sum = float(state["recent_sum"])
        self._epoch_sum = float(state["epoch_sum"])
        self._epoch_count = int(state["epoch_count"])

    def _add(self, loss: float) -> None:
        self._epoch_sum += loss
        self._epoch_count += 1
        self._recent.append(loss)
        self._recent_sum += loss
        while len(self._recent) > self._plan.steps_per_epoch:
            self._recent_sum -= self._recent.popleft()

    def _text(self, values: Mapping[str, float], epoch: int) -> str:
        parts = [
            f"left {self._time_left()}",
            f"avr_loss={values['loss/average']:.4f}",
            _rates(values),
            f"{values['speed/images_per_s']:.3g} img/s" if "speed/images_per_s" in values else "",
            f"{values['memory/device_gib']:.1f} GiB" if "memory/device_gib" in values else "",
            f"epoch {epoch}/{self._plan.num_epochs}",
        ]
        return ", ".join(filter(None, parts))

    def _time_left(self) -> str:
        """Returns the time that the steps which are left take, with saving and previews as often as so far."""
        if not self._warm_steps or self._warm_since is None:
            return "?"
        seconds_per_step = (self._clock() - self._warm_since) / self._warm_steps
        return str(tqdm.format_interval(seconds_per_step * max(0, self._plan.num_steps - self._step)))


def _rates(values: Mapping[str, float]) -> str:
    """Returns the learning rate of the model, and the text encoder's behind it where that is another one.

    A group stands for its part by coming first: LoRA+ has a second one, with a multiple of the rate.
    """
    names = [name.removeprefix("lr/") for name in values if name.startswith("lr/") and not name.startswith("lr/d*lr/")]
    texts = [values[f"lr/{name}"] for name in names if name.startswith("text")]
    others = [values[f"lr/{name}"] for name in names if not name.startswith("text")]
    if not others or not texts or texts[0] == others[0]:
        return "".join(f"lr={rate:.2e}" for rate in (*others, *texts)[:1])
    return f"lr={others[0]:.2e} (text encoder {texts[0]:.2e})"
