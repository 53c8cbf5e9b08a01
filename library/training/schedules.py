"""The learning rate's course over a run, as a factor on each group's own rate. Counted in optimizer steps.

The formulas are those of transformers and diffusers, whose names the flags bear. They stand here because importing
transformers for a cosine takes seconds, and because a lowest rate given as a number (``min_lr``, ``lr_end``) must be
divided by the group's own rate, not by ``--learning_rate``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.training.settings import OptimizerSettings

logger = logging.getLogger(__name__)

Factor = Callable[[int, float], float]
"""(steps taken so far, the group's rate) -> factor on that rate for the next step."""

_HALF_WAVE = 0.5  # num_cycles of a cosine that falls from top to bottom once
_TIMESCALE = 10_000  # of inverse_sqrt where neither a time scale nor a warm-up is given


@dataclass(frozen=True)
class Span:
    """The steps of a run and of its warm-up."""

    warmup: int
    total: int

    def rise(self, step: int) -> float:
        """Returns the factor during the warm-up: 0 at the first step, 1 after it."""
        return step / max(1, self.warmup)

    def progress(self, step: int) -> float:
        """Returns the share of what comes after the warm-up that is done."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


def _after_warmup(span: Span, falling: Factor) -> Factor:
    return lambda step, rate: span.rise(step) if step < span.warmup else falling(step, rate)


def _wave(num_cycles: float, progress: float) -> float:
    return 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress))


def _between(lowest: float, factor: float) -> float:
    return max(0.0, factor * (1 - lowest) + lowest)


def _constant(span: Span) -> Factor:
    return lambda step, rate: 1.0


def _constant_with_warmup(span: Span) -> Factor:
    return _after_warmup(span, lambda step, rate: 1.0)


def _linear(span: Span) -> Factor:
    return _after_warmup(span, lambda step, rate: max(0.0, 1 - span.progress(step)))


def _cosine(span: Span, num_cycles: float = _HALF_WAVE) -> Factor:
    return _after_warmup(span, lambda step, rate: max(0.0, _wave(num_cycles, span.progress(step))))


def _cosine_with_restarts(span: Span, num_cycles: float = 1) -> Factor:
    def factor(step: int, rate: float) -> float:
        progress = span.progress(step)
        return 0.0 if progress >= 1 else _wave(_HALF_WAVE, (num_cycles * progress) % 1)

    return _after_warmup(span, factor)


def _polynomial(span: Span, power: float = 1.0, lr_end: float = 1e-7) -> Factor:
    def factor(step: int, rate: float) -> float:
        if rate <= lr_end:
            raise ValueError(
                f"the rate falls to lr_end {lr_end:g}, but the learning rate {rate:g} is not above it; add"
                " --lr_scheduler_args lr_end=0"
            )
        left = max(0.0, 1 - span.progress(step))
        return (left**power * (rate - lr_end) + lr_end) / rate

    return _after_warmup(span, factor)


def _inverse_sqrt(span: Span, timescale: int | None = None) -> Factor:
    scale = timescale or span.warmup or _TIMESCALE
    return _after_warmup(span, lambda step, rate: math.sqrt(scale / (step - span.warmup + scale)))


def _lowest(rate: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if min_lr_rate is not None:
        return min_lr_rate
    return (min_lr or 0.0) / rate


def _refuse_both(min_lr: float | None, min_lr_rate: float | None) -> None:
    if min_lr is not None and min_lr_rate is not None:
        raise ValueError("min_lr and the share (--lr_scheduler_min_lr_ratio or min_lr_rate) both set the lowest rate")


def _cosine_with_min_lr(
    span: Span,
    num_cycles: float = _HALF_WAVE,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Factor:
    _refuse_both(min_lr, min_lr_rate)

    def factor(step: int, rate: float) -> float:
        return _between(_lowest(rate, min_lr, min_lr_rate), _wave(num_cycles, span.progress(step)))

    return _after_warmup(span, factor)


def _cosine_warmup_with_min_lr(
    span: Span,
    num_cycles: float = _HALF_WAVE,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Factor:
    """One step ahead of ``cosine_with_min_lr``: the first step has a rate above 0, and the last one the lowest."""
    _refuse_both(min_lr, min_lr_rate)

    def factor(step: int, rate: float) -> float:
        if step < span.warmup:
            if warmup_lr_rate is None:
                return span.rise(step + 1)
            return warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, span.warmup - 1)
        return _between(_lowest(rate, min_lr, min_lr_rate), _wave(num_cycles, span.progress(step + 1)))

    return factor


_FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda done, num_cycles: 1 - done,
    "cosine": lambda done, num_cycles: _wave(num_cycles, done),
    "1-sqrt": lambda done, num_cycles: 1 - math.sqrt(done),
}
"""How ``warmup_stable_decay`` falls from 1 to 0; it rises the same way backwards."""


def _fall(kind: str) -> Callable[[float, float], float]:
    if kind not in _FALLS:
        raise ValueError(f"{kind!r} is no way to rise or fall; known are {', '.join(_FALLS)}")
    return _FALLS[kind]


def _warmup_stable_decay(
    span: Span,
    num_decay_steps: int = 0,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = _HALF_WAVE,
) -> Factor:
    rise, fall = _fall(warmup_type), _fall(decay_type)
    stable = max(0, span.total - span.warmup - num_decay_steps) if num_stable_steps is None else num_stable_steps
    if not num_decay_steps:
        logger.warning("--lr_scheduler warmup_stable_decay never decays: --lr_decay_steps is 0 of %d steps", span.total)
    elif span.warmup + stable + num_decay_steps > span.total:
        logger.warning("warm-up, stable part and decay are together longer than the run of %d steps", span.total)

    def factor(step: int, rate: float) -> float:
        if step < span.warmup:
            return _between(min_lr_ratio, rise(1 - span.rise(step), _HALF_WAVE))
        decaying = step - span.warmup - stable
        if decaying < 0:
            return 1.0
        if decaying >= num_decay_steps:
            return min_lr_ratio
        return _between(min_lr_ratio, fall(decaying / num_decay_steps, num_cycles))

    return factor


def _piecewise_constant(span: Span, step_rules: str) -> Factor:
    *parts, last = step_rules.split(",")
    rules = sorted((int(until), float(value)) for value, until in (part.split(":") for part in parts))
    after = float(last)
    return lambda step, rate: next((value for until, value in rules if step < until), after)


_SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
    "piecewise_constant": _piecewise_constant,
}


def _steps(value: int | float, num_steps: int) -> int:
    return int(value * num_steps) if isinstance(value, float) else value


def schedule(settings: OptimizerSettings, num_steps: int, arguments: dict[str, Any]) -> Factor:
    """Returns the course that ``--lr_scheduler`` and its flags name.

    Args:
        settings: the flags.
        num_steps: optimizer steps of the whole run.
        arguments: ``--lr_scheduler_args``; they go before the flags.

    Raises:
        TypeError, ValueError: the schedule has no such argument, or its value makes no sense.
    """
    name, ratio = settings.lr_scheduler, settings.lr_scheduler_min_lr_ratio
    span = Span(_steps(settings.lr_warmup_steps, num_steps), num_steps)
    if span.warmup > num_steps:
        logger.warning("--lr_warmup_steps %d is longer than the run of %d steps", span.warmup, num_steps)
    # As in sd-scripts, a cycle of the flag is half a wave in these schedules: once from the top to the bottom.
    half_waves = {"num_cycles": settings.lr_scheduler_num_cycles / 2}
    lowest = {} if ratio is None else {"min_lr_rate": ratio}
    from_flags: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": settings.lr_scheduler_num_cycles},
        "polynomial": {"power": settings.lr_scheduler_power},
        "inverse_sqrt": {"timescale": settings.lr_scheduler_timescale},
        "cosine_with_min_lr": {**half_waves, **lowest},
        "cosine_warmup_with_min_lr": {**half_waves, **lowest},
        "warmup_stable_decay": {
            "num_decay_steps": _steps(settings.lr_decay_steps, num_steps),
            "min_lr_ratio": ratio or 0.0,
            **half_waves,
        },
    }
    return _SCHEDULES[name](span, **{**from_flags.get(name, {}), **arguments})
