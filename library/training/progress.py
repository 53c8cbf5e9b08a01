"""What a person sees of a running training: the bar with loss, speed and time left, and the averages behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from library.training.report import RunPlan


class Progress:
    """The progress bar and the running averages of the loss."""

    def __init__(self, plan: RunPlan, visible: bool) -> None:
        self._plan = plan
        self._visible = visible
        self._bar: tqdm | None = None
        self._recent: deque[float] = deque(maxlen=plan.steps_per_epoch)
        self._epoch: list[float] = []

    @contextmanager
    def shown(self, start_step: int) -> Iterator[None]:
        """Shows the bar while the block runs."""
        total = self._plan.num_steps
        with tqdm(total=total, initial=start_step, desc="steps", disable=not self._visible, smoothing=0.05) as bar:
            self._bar = bar
            yield

    def after_step(self, values: dict[str, float], epoch: int, num_samples: int) -> None:
        """Adds the running average to a step's values, and moves the bar."""
        self._recent.append(values["loss/current"])
        self._epoch.append(values["loss/current"])
        values["loss/average"] = sum(self._recent) / len(self._recent)
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix(avr_loss=f"{values['loss/average']:.4f}", epoch=f"{epoch}/{self._plan.num_epochs}")

    def state_dict(self) -> dict[str, list[float]]:
        """Returns what the averages are made of."""
        return {"recent": list(self._recent), "epoch": list(self._epoch)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continues the averages of an earlier run."""
        self._recent.extend(state["recent"])
        self._epoch = list(state["epoch"])

    def after_epoch(self) -> dict[str, float]:
        """Returns what is worth logging of the epoch that ends."""
        values = {"loss/epoch_average": sum(self._epoch) / len(self._epoch)}
        self._epoch = []
        return values
