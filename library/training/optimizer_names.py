"""Names of optimizers and schedulers, and what can be checked of them without importing anything heavy."""

from __future__ import annotations

import ast
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from library.errors import SettingsError, nearest

if TYPE_CHECKING:
    from library.training.settings import OptimizerSettings

logger = logging.getLogger(__name__)


class OptimizerSource(NamedTuple):
    """Where a built-in optimizer comes from: its module, class, and the package to install."""

    module: str
    class_name: str
    package: str = ""


def _from(module: str, package: str, *class_names: str) -> dict[str, OptimizerSource]:
    return {name.lower(): OptimizerSource(module, name, package) for name in class_names}


OPTIMIZERS: dict[str, OptimizerSource] = {
    "adamw": OptimizerSource("torch.optim", "AdamW"),
    "sgdnesterov": OptimizerSource("torch.optim", "SGD"),
    "sgdnesterov8bit": OptimizerSource("bitsandbytes.optim", "SGD8bit", "bitsandbytes"),
    **_from("bitsandbytes.optim", "bitsandbytes", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"),
    **_from("bitsandbytes.optim", "bitsandbytes", "Lion8bit", "PagedLion8bit"),
    **_from("lion_pytorch", "lion-pytorch", "Lion"),
    "dadaptation": OptimizerSource("dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation"),
    **_from("dadaptation.experimental", "dadaptation", "DAdaptAdamPreprint", "DAdaptAdanIP"),
    **_from("dadaptation", "dadaptation", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"),
    **_from("prodigyopt", "prodigyopt", "Prodigy"),
    **_from("transformers.optimization", "transformers", "Adafactor"),
    **_from("schedulefree", "schedulefree", "AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"),
}
"""Lower-case name -> source. Every other name is a class of torch.optim or a dotted path."""

_PACKAGES = {
    **{source.module.partition(".")[0]: source.package for source in OPTIMIZERS.values() if source.package},
    "prodigyplus": "prodigy-plus-schedule-free",
    "pytorch_optimizer": "pytorch-optimizer",
    "came_pytorch": "came-pytorch",
}
"""First part of a dotted path -> package to install, where the two differ or the path is a usual one."""

DEFAULT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "sgdnesterov": {"momentum": 0.9, "nesterov": True},
    "sgdnesterov8bit": {"momentum": 0.9, "nesterov": True},
    "adafactor": {"relative_step": True},
}

# torch.optim's classes, so that a misspelt name is refused before torch is imported; a test compares it with torch.
TORCH_OPTIMIZERS = (
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "LBFGS",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "SparseAdam",
)
_UNUSABLE = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "LoRA's gradients are dense",
    "Muon": "it refuses parameters that are not matrices and learning rates of LoRA's size; use AdamW",
}

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "reduce_lr_on_plateau",
    "adafactor",
)
WITHOUT_WARMUP = ("constant", "piecewise_constant", "reduce_lr_on_plateau", "adafactor")
"""Schedules on which ``--lr_warmup_steps`` has no effect."""
WITH_CYCLES = ("cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")

_WORDS = {"inf": math.inf, "-inf": -math.inf, "true": True, "false": False, "none": None}
"""Values that are no Python literals, but that can mean one thing only."""


def parse_literals(flag_name: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Returns ``name=value`` arguments with values read as Python literals (numbers, tuples, True, quoted texts).

    ``inf`` and lower-case ``true``, ``false`` and ``none`` are read too.

    Raises:
        SettingsError: an argument has no ``=`` or its value is no literal.
    """
    from library.training.settings import split_arguments

    result = {}
    for name, text in split_arguments(flag_name, arguments).items():
        if text.lower() in _WORDS:
            result[name] = _WORDS[text.lower()]
            continue
        try:
            result[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise SettingsError(
                f"{flag_name}: the value of {name}={text} is no Python literal; put texts in quotes, such as"
                f" {name}=\"'{text}'\""
            ) from error
    return result


def _class_name(name: str) -> str:
    return name.rpartition(".")[2].lower()


def finds_its_own_rate(name: str) -> bool:
    """Whether an optimizer of this name estimates one learning rate for all parameters (D-Adaptation, Prodigy)."""
    return _class_name(name).startswith("dadapt") or _class_name(name) == "prodigy"


def takes_a_factor(name: str) -> bool:
    """Whether ``--learning_rate`` is a factor on what an optimizer of this name finds, and belongs at 1."""
    return finds_its_own_rate(name) or "prodigy" in name.lower()


def is_schedule_free(name: str) -> bool:
    """Whether an optimizer of this name averages its parameters instead of following a schedule."""
    return _class_name(name).endswith("schedulefree")


def sets_its_own_rate(settings: OptimizerSettings) -> bool:
    """Whether this is transformers' Adafactor with ``relative_step``, which it has unless told otherwise."""
    name = settings.resolved_optimizer.lower()
    if name not in ("adafactor", "transformers.adafactor", "transformers.optimization.adafactor"):
        return False
    arguments = parse_literals("--optimizer_args", settings.optimizer_args)
    return bool(arguments.get("relative_step", True) or arguments.get("warmup_init", False))


def needs_no_schedule(settings: OptimizerSettings) -> bool:
    """Whether the optimizer leaves nothing to a schedule."""
    return is_schedule_free(settings.resolved_optimizer) or sets_its_own_rate(settings)


def require_package(settings: OptimizerSettings) -> None:
    """Checks that the optimizer's and the scheduler's package is installed, without importing it.

    Raises:
        SettingsError: it is not.
    """
    name = settings.resolved_optimizer
    source = OPTIMIZERS.get(name.lower())
    # torch itself, which has no package to name here, is missed as soon as the program starts it.
    if source is not None and source.package and importlib.util.find_spec(source.module.partition(".")[0]) is None:
        raise missing_package(name, source)
    paths = {"--lr_scheduler_type": settings.lr_scheduler_type, "--optimizer_type": "" if source else name}
    for flag, path in paths.items():
        package = path.partition(".")[0]
        if "." in path and package and importlib.util.find_spec(package) is None:
            remedy = (
                f"run: pip install {_PACKAGES[package]}" if package in _PACKAGES else "install it, or mend the name"
            )
            raise SettingsError(f"{flag}: {path} cannot be imported: there is no package {package}; {remedy}")


def missing_package(name: str, source: OptimizerSource) -> SettingsError:
    """Returns the error that says how to install an optimizer's package."""
    return SettingsError(
        f"--optimizer_type: {name} comes from a package that is not installed; run: pip install {source.package}"
    )


def check_optimizer(settings: OptimizerSettings) -> None:
    """Checks the optimizer's name, its arguments' form, and what goes with it.

    Raises:
        SettingsError: the name is neither built in, nor a class of torch.optim, nor a dotted path; or the optimizer
            cannot work with another flag.
    """
    name = settings.resolved_optimizer
    parse_literals("--optimizer_args", settings.optimizer_args)
    if is_schedule_free(name) and settings.ema_decay is not None:
        raise SettingsError(averaged_twice(name))
    if name.lower() in OPTIMIZERS:
        return
    torch_name = name.removeprefix("torch.optim.")
    if torch_name in _UNUSABLE:
        raise SettingsError(f"--optimizer_type: {name} cannot train a LoRA: {_UNUSABLE[torch_name]}")
    if "." not in name and name not in TORCH_OPTIMIZERS:
        sources = OPTIMIZERS.items()
        known = [source.class_name if source.class_name.lower() == key else key for key, source in sources]
        raise SettingsError(
            f"--optimizer_type: {name!r} is no optimizer{nearest(name, [*known, *TORCH_OPTIMIZERS])}; give a built-in name,"
            " a torch.optim class or a dotted path such as package.module.Class"
        )


def averaged_twice(name: str) -> str:
    """Returns why ``--ema_decay`` and a schedule-free optimizer exclude each other."""
    return (
        f"--ema_decay: {name} averages the weights already, and the average is what it saves; leave --ema_decay out, or"
        " use another --optimizer_type"
    )


def check_rates(
    settings: OptimizerSettings, rates: Sequence[float | None], network_arguments: Mapping[str, str]
) -> None:
    """Checks that an optimizer which finds one learning rate for everything is given one.

    Args:
        settings: optimizer.
        rates: of the trained parts.
        network_arguments: ``--network_args``; LoRA+ makes two rates of one.

    Raises:
        SettingsError: it is given several.
    """
    name = settings.resolved_optimizer
    if not finds_its_own_rate(name):
        return
    different = sorted({rate for rate in rates if rate})
    if len(different) > 1:
        raise SettingsError(
            f"--optimizer_type {name} finds one learning rate for all parts, so --learning_rate, --unet_lr and"
            f" --text_encoder_lr cannot differ ({', '.join(f'{rate:g}' for rate in different)}); give --learning_rate=1"
            " alone"
        )
    plus = [argument for argument in network_arguments if argument.startswith("loraplus_")]
    if plus:
        raise SettingsError(
            f"--network_args: {plus[0]} gives lora_up a learning rate of its own, but --optimizer_type {name} finds one for"
            f" all; leave {plus[0]} out, or use AdamW"
        )


def warn_where_no_rate_is_given(
    settings: OptimizerSettings, is_given: bool, own_rates: Mapping[str, float | None]
) -> None:
    """Warns of parts that are trained with the default of ``--learning_rate`` because nobody gave a rate.

    Args:
        settings: optimizer. Those that find or set their rate themselves are warned of where they are made.
        is_given: whether ``--learning_rate`` is.
        own_rates: of the trained parts; None: it has no rate of its own.
    """
    parts = [part for part, rate in own_rates.items() if rate is None]
    if is_given or not parts or takes_a_factor(settings.resolved_optimizer) or sets_its_own_rate(settings):
        return
    logger.warning(
        "--learning_rate is left out, so that sd-scripts' default of %g is used for %s, with which a LoRA hardly learns;"
        " 1e-4 is usual",
        settings.learning_rate,
        " and ".join(parts),
    )


def check_scheduler(settings: OptimizerSettings) -> None:
    """Checks the scheduler's name and the arguments that belong to it.

    Raises:
        SettingsError: unknown name, or an argument that the scheduler needs is missing or has no effect.
    """
    arguments = parse_literals("--lr_scheduler_args", settings.lr_scheduler_args)
    name, optimizer = settings.lr_scheduler, settings.resolved_optimizer
    if not settings.lr_scheduler_type and name not in SCHEDULERS:
        raise SettingsError(
            f"--lr_scheduler: {name!r} is no scheduler{nearest(name, SCHEDULERS)}; known are {', '.join(SCHEDULERS)}"
        )
    if settings.lr_scheduler_type or needs_no_schedule(settings):
        return
    if name == "adafactor":
        raise SettingsError(
            "--lr_scheduler adafactor is the rate that --optimizer_type Adafactor sets itself, unless --optimizer_args"
            f" relative_step=False stops it; here the optimizer is {optimizer}"
            + (" with relative_step=False" if optimizer.lower() == "adafactor" else "")
            + "; use constant_with_warmup or cosine"
        )
    if name == "constant" and settings.lr_warmup_steps:
        raise SettingsError(
            f"--lr_scheduler constant has no warm-up, so --lr_warmup_steps {settings.lr_warmup_steps} would have no"
            " effect; use constant_with_warmup"
        )
    if optimizer.lower() == "dadaptsgd" and settings.lr_warmup_steps and name not in WITHOUT_WARMUP:
        raise SettingsError(
            f"--optimizer_type {optimizer} divides by what it sees at the first step, where the warm-up's rate is 0; leave"
            " --lr_warmup_steps out"
        )
    has_min = settings.lr_scheduler_min_lr_ratio is not None or {"min_lr", "min_lr_rate"} & set(arguments)
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not has_min:
        raise SettingsError(f"--lr_scheduler {name} needs a lowest rate; add --lr_scheduler_min_lr_ratio 0.1")
    if name == "piecewise_constant" and "step_rules" not in arguments:
        raise SettingsError(
            "--lr_scheduler piecewise_constant needs its steps; add --lr_scheduler_args \"step_rules='1:100,0.1'\""
        )
