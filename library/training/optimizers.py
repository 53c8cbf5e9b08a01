"""Optimizer and scheduler names to objects. The names and what can be checked early are in ``optimizer_names.py``."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from library.errors import SettingsError
from library.training.optimizer_names import (
    DEFAULT_ARGUMENTS,
    OPTIMIZERS,
    WITHOUT_WARMUP,
    OptimizerSource,
    averaged_twice,
    finds_its_own_rate,
    missing_package,
    needs_no_schedule,
    parse_literals,
    sets_its_own_rate,
    takes_a_factor,
)
from library.training.schedules import Factor, schedule
from library.training.settings import OptimizerSettings

logger = logging.getLogger(__name__)

# Arguments of torch's optimizers that say how a step is computed, not what.
_WAYS = {"fused", "foreach", "capturable", "differentiable"}
_LONG_RUN_STEPS = 10**6  # longer than any warm-up


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
    except Exception as error:  # whatever a package raises that does not go with this torch or this GPU's driver
        if isinstance(error, ModuleNotFoundError) and error.name == source.module.partition(".")[0]:
            raise missing_package(name, source) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SettingsError(
            f"--optimizer_type: {name} comes from {source.package or source.module}, which is installed but cannot be"
            f" loaded ({reason}); install it anew in a version for this torch ({torch.__version__}), or use another"
            " optimizer such as AdamW"
        ) from error
    return getattr(module, source.class_name)


def scheduler_class(settings: OptimizerSettings) -> type[LRScheduler] | None:
    """Returns the class of ``--lr_scheduler_type``, or None where ``--lr_scheduler`` names a known one."""
    name = settings.lr_scheduler_type
    if not name:
        return None
    return _import_class(name if "." in name else f"torch.optim.lr_scheduler.{name}", "--lr_scheduler_type")


def _final_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    arguments = {
        **DEFAULT_ARGUMENTS.get(settings.resolved_optimizer.lower(), {}),
        **parse_literals("--optimizer_args", settings.optimizer_args),
    }
    if sets_its_own_rate(settings):  # warmup_init asks for it too, also beside relative_step=False
        arguments["relative_step"] = True
    return arguments


def switches_modes(optimizer: Optimizer) -> bool:
    """Whether the optimizer trains other values than those that are meant for use (schedule-free ones)."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def parameter_groups(network: Any, settings: OptimizerSettings) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the groups of a network's parameters, each with its learning rate, and their names.

    Raises:
        SettingsError: nothing is to be trained.
    """
    text_rates = list(settings.text_encoder_lr) or None
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        prepared = network.prepare_optimizer_params_with_multiple_te_lrs(
            text_rates, settings.unet_lr, settings.learning_rate
        )
    else:
        text_rate = text_rates[0] if text_rates else None
        prepared = network.prepare_optimizer_params(text_rate, settings.unet_lr, settings.learning_rate)
    groups, names = prepared if isinstance(prepared, tuple) else (prepared, None)
    if not groups:
        raise SettingsError("every part of the network has learning rate 0; raise --learning_rate")
    groups = [{**group, "params": _listed(group["params"])} for group in groups]
    return groups, [name or f"group{i}" for i, name in enumerate(names or [None] * len(groups))]


def _listed(parameters: torch.Tensor | Iterable[torch.nn.Parameter]) -> list[Any]:
    """Returns a group's parameters in the form that may be looked at twice; torch takes one alone, and generators, too."""
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def build_optimizer(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> Optimizer:
    """Returns the optimizer, ready to train, over parameter groups that carry their own ``lr``.

    Raises:
        SettingsError: the optimizer refuses ``--optimizer_args``, or the groups' learning rates.
    """
    name = settings.resolved_optimizer
    arguments = _final_arguments(settings)
    if arguments.pop("lr", None) is not None:
        raise SettingsError("--optimizer_args: lr is set by --learning_rate; remove it there")
    rates = [float(group["lr"]) for group in groups]
    _check_group_rates(name, rates)
    # Where --learning_rate is 0 because --unet_lr is given, some optimizers would refuse the 0 that no group uses.
    lr: float | None = settings.learning_rate or max(rates)
    if sets_its_own_rate(settings):
        lr = None
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
        logger.warning(
            "Adafactor with relative_step sets its own learning rate: --learning_rate, --unet_lr, --text_encoder_lr and"
            " --lr_scheduler have no effect. --optimizer_args relative_step=False scale_parameter=False gives them back"
        )
    make: Callable[..., Optimizer] = optimizer_class(settings)
    try:
        optimizer = make(groups, lr=lr, **arguments, **_way(make, arguments, groups))
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise SettingsError(f"--optimizer_type {name} with --optimizer_args: {error}") from error
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if group["lr"] is None:
            group["lr"] = rate  # never read, but schedules expect a number
        group.setdefault("initial_lr", group["lr"])
    _warn_of_arguments(settings, arguments, rates)
    if switches_modes(optimizer):
        if settings.ema_decay is not None:
            raise SettingsError(averaged_twice(name))
        optimizer.train()  # type: ignore[attr-defined]  # what switches_modes has just found
    return optimizer


def _way(make: Callable[..., Optimizer], given: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns the argument that has a step of torch's optimizers done by one kernel, unless another way is asked for.

    By itself torch does it in a dozen passes over all parameters on GPUs, and parameter by parameter on CPUs, which
    takes ten times as long. SGD's kernel fails where a parameter has its first gradient later than others, as by a
    module dropout of other network modules.
    """
    knows = make in (torch.optim.Adam, torch.optim.AdamW) and not _WAYS & given.keys()
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return {"fused": True} if knows and devices <= {"cpu", "cuda"} else {}


def rehearse(settings: OptimizerSettings) -> None:
    """Makes optimizer and schedule once for a parameter of no use: wrong arguments must show before anything is encoded.

    Raises:
        SettingsError: one of them refuses its arguments.
    """
    rate = settings.unet_lr or settings.learning_rate or max(settings.text_encoder_lr, default=0.0)
    group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": rate}
    level = logger.level
    logger.setLevel(logging.ERROR)  # what there is to warn of is said when they are made in earnest
    try:
        build_scheduler(settings, build_optimizer(settings, [group]), _LONG_RUN_STEPS)
    finally:
        logger.setLevel(level)


def _check_group_rates(name: str, rates: list[float]) -> None:
    if finds_its_own_rate(name) and len({rate for rate in rates if rate}) > 1:
        raise SettingsError(
            f"--optimizer_type {name} finds one learning rate for all parameters, but the network's parts have"
            f" {', '.join(f'{rate:g}' for rate in rates)}; give --learning_rate=1 alone, without LoRA+"
        )


def _warn_of_arguments(settings: OptimizerSettings, arguments: dict[str, Any], rates: list[float]) -> None:
    name = settings.resolved_optimizer
    largest = max(rates)
    if takes_a_factor(name) and not 0.1 < largest <= 10:
        logger.warning(
            "%s finds the learning rate by itself and multiplies it by --learning_rate, which is %g; the usual value is 1.0",
            name,
            largest,
        )
    warms_up = settings.lr_warmup_steps and settings.lr_scheduler not in WITHOUT_WARMUP
    if name.lower() == "prodigy" and warms_up and not arguments.get("safeguard_warmup"):
        logger.warning(
            "Prodigy takes a warm-up for small steps and overestimates its learning rate; add --optimizer_args"
            " safeguard_warmup=True"
        )
    scales = name.lower() == "adafactor" and not arguments["relative_step"] and arguments.get("scale_parameter", True)
    if scales:
        logger.warning(
            "Adafactor multiplies --learning_rate by the size of each parameter, and lora_up starts at 0, so that it"
            " learns a thousand times more slowly at first; the usual --optimizer_args are relative_step=False"
            " scale_parameter=False"
        )


def describe_optimizer(settings: OptimizerSettings) -> str:
    """Returns ``module.Class(name=value,...)``, as the file's metadata names the optimizer."""
    found = optimizer_class(settings)
    listed = ",".join(f"{name}={value}" for name, value in _final_arguments(settings).items())
    return f"{found.__module__}.{found.__name__}" + (f"({listed})" if listed else "")


def build_scheduler(settings: OptimizerSettings, optimizer: Optimizer, num_steps: int) -> LRScheduler:
    """Returns the learning rate's schedule over ``num_steps`` optimizer steps, whatever the number of processes.

    Raises:
        SettingsError: the scheduler refuses its arguments.
    """
    if needs_no_schedule(settings) or switches_modes(optimizer):
        return LambdaLR(optimizer, lambda _: 1.0)
    arguments = parse_literals("--lr_scheduler_args", settings.lr_scheduler_args)
    custom = scheduler_class(settings)
    try:
        if custom is not None:
            return custom(optimizer, **arguments)
        if settings.lr_scheduler == "reduce_lr_on_plateau":
            return ReduceLROnPlateau(optimizer, **arguments)
        factor = schedule(settings, num_steps, arguments)
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        return LambdaLR(optimizer, [partial(_factor_at, factor, rate) for rate in rates])
    except (TypeError, ValueError, ZeroDivisionError) as error:
        name = settings.lr_scheduler_type or settings.lr_scheduler
        reason = re.sub(r"^_?\w+\(\) ", "", str(error))  # the name of a function says nothing to a user
        raise SettingsError(f"--lr_scheduler {name}: {reason}") from error


def _factor_at(factor: Factor, rate: float, step: int) -> float:
    return factor(step, rate)


def goes_by_the_loss(scheduler: LRScheduler) -> bool:
    """Whether the schedule is told a loss, instead of counting steps (reduce_lr_on_plateau and its like)."""
    return "metrics" in inspect.signature(type(scheduler).step).parameters


def used_rate(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Returns the learning rate of the step that was just taken, also where the optimizer sets it itself."""
    if group.get("relative_step"):  # Adafactor; as in its own schedule, the first parameter stands for the group
        state = optimizer.state[group["params"][0]]
        return float(optimizer._get_lr(group, state)) if state else float(group["lr"])  # type: ignore[attr-defined]
    return float(group.get("scheduled_lr", group["lr"]))


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Returns the norm of all gradients, after scaling them down to ``max_norm`` where that is above 0."""
    if max_norm > 0:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
