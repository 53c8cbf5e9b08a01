"""Optimizer and scheduler names to objects. The names and what can be checked early are in ``optimizer_names.py``."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.errors import SettingsError
from library.training.optimizer_names import DEFAULT_ARGUMENTS, OPTIMIZERS, OptimizerSource, parse_literals
from library.training.settings import OptimizerSettings

logger = logging.getLogger(__name__)


def _import_class(path: str, flag: str) -> type:
    module_name, _, class_name = path.rpartition(".")
    if not module_name.strip(".") or not class_name:
        raise SettingsError(f"{flag}: {path} is no path of the form package.module.Class")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise SettingsError(
            f"{flag}: {path} cannot be imported: {error}; install its package, or mend the name"
        ) from error
    except AttributeError as error:
        raise SettingsError(f"{flag}: module {module_name} has no {class_name}; mend the name") from error
    if not inspect.isclass(found):
        raise SettingsError(f"{flag}: {path} is no class")
    return found


def optimizer_class(settings: OptimizerSettings) -> type[Optimizer]:
    """Returns the optimizer's class.

    Raises:
        SettingsError: its package is not installed, or a dotted path leads nowhere.
    """
    name = settings.resolved_optimizer
    source = OPTIMIZERS.get(name.lower())
    if source is None:
        path = name if "." in name else f"torch.optim.{name}"
        return _import_class(path, "--optimizer_type")
    return _built_in_class(name, source)


def _built_in_class(name: str, source: OptimizerSource) -> type[Optimizer]:
    try:
        module = importlib.import_module(source.module)
    except ImportError as error:
        raise SettingsError(
            f"--optimizer_type: {name} comes from a package that is not installed; run: pip install {source.package}"
        ) from error
    return getattr(module, source.class_name)


def scheduler_class(settings: OptimizerSettings) -> type[LRScheduler] | None:
    """Returns the class of ``--lr_scheduler_type``, or None where ``--lr_scheduler`` names a known one."""
    name = settings.lr_scheduler_type
    if not name:
        return None
    return _import_class(name if "." in name else f"torch.optim.lr_scheduler.{name}", "--lr_scheduler_type")


def build_optimizer(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> Optimizer:
    """Returns the optimizer over parameter groups that carry their own ``lr``.

    Raises:
        SettingsError: the optimizer refuses ``--optimizer_args``.
    """
    arguments = parse_literals("--optimizer_args", settings.optimizer_args)
    defaults = DEFAULT_ARGUMENTS.get(settings.resolved_optimizer.lower(), {})
    if arguments.pop("lr", None) is not None:
        raise SettingsError("--optimizer_args: lr is set by --learning_rate; remove it there")
    make: Callable[..., Optimizer] = optimizer_class(settings)
    try:
        return make(groups, lr=settings.learning_rate, **{**defaults, **arguments})
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise SettingsError(f"--optimizer_type {settings.resolved_optimizer} with --optimizer_args: {error}") from error


def describe_optimizer(settings: OptimizerSettings) -> str:
    """Returns ``module.Class(name=value,...)``, as the file's metadata names the optimizer."""
    found = optimizer_class(settings)
    arguments = {
        **DEFAULT_ARGUMENTS.get(settings.resolved_optimizer.lower(), {}),
        **parse_literals("--optimizer_args", settings.optimizer_args),
    }
    listed = ",".join(f"{name}={value}" for name, value in arguments.items())
    return f"{found.__module__}.{found.__name__}" + (f"({listed})" if listed else "")


def _steps(value: int | float, num_steps: int) -> int:
    return int(value * num_steps) if isinstance(value, float) else value


def build_scheduler(settings: OptimizerSettings, optimizer: Optimizer, num_steps: int) -> LRScheduler:
    """Returns the learning rate's schedule over ``num_steps`` optimizer steps, whatever the number of processes.

    Raises:
        SettingsError: the scheduler refuses its arguments.
    """
    arguments = parse_literals("--lr_scheduler_args", settings.lr_scheduler_args)
    custom = scheduler_class(settings)
    warmup = _steps(settings.lr_warmup_steps, num_steps)
    if warmup > num_steps:
        logger.warning("--lr_warmup_steps %d is longer than the run of %d steps", warmup, num_steps)
    try:
        if custom is not None:
            return custom(optimizer, **arguments)
        return _known_scheduler(settings, optimizer, warmup, num_steps, arguments)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        name = settings.lr_scheduler_type or settings.lr_scheduler
        raise SettingsError(f"--lr_scheduler {name}: {error}") from error


def _known_scheduler(
    settings: OptimizerSettings, optimizer: Optimizer, warmup: int, num_steps: int, arguments: dict[str, Any]
) -> LRScheduler:
    name = settings.lr_scheduler
    if name == "constant":  # by far the most used; spares the import of transformers
        return LambdaLR(optimizer, lambda _: 1.0)
    if name == "piecewise_constant":
        from diffusers.optimization import get_piecewise_constant_schedule

        return get_piecewise_constant_schedule(optimizer, **arguments)
    from transformers.optimization import get_scheduler

    ratio = settings.lr_scheduler_min_lr_ratio
    # In these schedules a cycle is a whole cosine, and half of one falls from the top to the bottom.
    half_cycles = {"num_cycles": settings.lr_scheduler_num_cycles / 2}
    lowest = {} if ratio is None else {"min_lr_rate": ratio}
    specific: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": settings.lr_scheduler_num_cycles},
        "polynomial": {"power": settings.lr_scheduler_power},
        "inverse_sqrt": {"timescale": settings.lr_scheduler_timescale},
        "cosine_with_min_lr": {**half_cycles, **lowest},
        "cosine_warmup_with_min_lr": {**half_cycles, **lowest},
        "warmup_stable_decay": {
            "num_decay_steps": _steps(settings.lr_decay_steps, num_steps),
            "min_lr_ratio": ratio or 0.0,
            **half_cycles,
        },
    }
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
        scheduler_specific_kwargs={**specific.get(name, {}), **arguments},
    )


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Returns the norm of all gradients, after scaling them down to ``max_norm`` where that is above 0."""
    if max_norm > 0:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
